// Inline Markdown: emphasis, code, links. Marks are paired first, then the elements are built in one pass, so that any text
// takes about linear time. HTML and entities are shown as text.

import { el } from "./dom.js";

const MAX_DEPTH = 12;  // nested elements; browsers crash on documents that are thousands of elements deep
const RECENT = 300;  // characters; while a reply is generated, marks opened this close to the end count as closed

const MARK = new RegExp(
  [
    String.raw`\\[(\[](?=\S)`, // \( or \[ starts a formula
    String.raw`\\[!-/:-@[-\x60{-~]`, // an escaped mark
    "`+",
    String.raw`\*+|_+|~~`,
    String.raw`!?\[`,
    String.raw`\]`,
    String.raw`<br ?/?>`,
    String.raw`<(?:https?://|mailto:)[^\s<>]+>`,
    String.raw`https?://[^\s<>\x60]+`,
    String.raw`\${1,2}`,
    "\n",
  ].join("|"),
  "gi",
);
// (address "title") after the text of a link
const LINK_TARGET = /\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"\n]*"|'[^'\n]*'))?\s*\)/y;

// Links may be http, https or mailto. Entities are not decoded, and whitespace is not tolerated.
export function safeUrl(address) {
  if (!/^(https?:\/\/[^/]|mailto:[^/])/i.test(address)) return null;
  const url = URL.parse ? URL.parse(address) : URL.canParse(address) ? new URL(address) : null;
  return url && ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

// Append `text` to `target`. `writing`: the text is incomplete, so marks that are still open count as closed at the end.
// `passages`: numbers of passages that [1] may cite.
export function inline(target, text, { writing = false, passages = null } = {}) {
  const recent = writing ? RECENT : 0;
  const tokens = tokenize(writing ? withoutIncompleteEnd(text) : text, passages, recent);
  pairMarks(tokens, recent);
  build(target, tokens);
}

// An incomplete text without the mark or the address that is incomplete at its end: it is not shown yet.
function withoutIncompleteEnd(text) {
  const linkText = (match, label, rest) => (rest === "]" && /^\d*$/.test(label) ? match : label);  // [1] may be a citation
  const end = text.slice(-RECENT).replace(/!?\[([^\]\n]*)(\]\([^)\s]*|\])?$/, linkText).replace(/[*_~`]+$/, "");
  return text.slice(0, -RECENT) + end;
}

function tokenize(text, passages, recent) {
  const result = [];
  const brackets = [];
  const missing = new Set();  // closing marks that do not occur again, so that each is searched only once
  let done = 0;  // characters that the tokens so far cover
  const closing = (mark, from) => {
    if (missing.has(mark)) return -1;
    const index = text.indexOf(mark, from);
    if (index < 0) missing.add(mark);
    return index;
  };
  MARK.lastIndex = 0;
  for (;;) {
    const match = MARK.exec(text);
    if (!match) break;
    const mark = match[0];
    const start = match.index;
    let end = start + mark.length;
    let token = null;
    const first = mark[0];
    if (mark === "\\(" || mark === "\\[") {
      const close = closing(mark === "\\(" ? "\\)" : "\\]", end);
      token = close < 0 ? { text: mark[1] } : { formula: text.slice(end, close) };
      if (close >= 0) end = close + 2;
    } else if (first === "\\") token = { text: mark[1] };
    else if (first === "`") {
      let close = closing(mark, end);
      while (close >= 0 && (text[close + mark.length] === "`" || text[close - 1] === "`")) {
        let runEnd = close;  // a longer run of backticks is another mark: skip it
        while (text[runEnd] === "`") runEnd += 1;
        close = closing(mark, runEnd);
      }
      if (close < 0 && recent && text.length - start < recent && mark.length < 3) close = text.length;
      token = close < 0 ? { text: mark } : { code: unpadded(text.slice(end, close)) };
      if (close >= 0) end = close + mark.length;
    } else if (first === "$") {
      token = formula(text, mark, start);
      end = token.end ?? end;
    } else if (first === "\n") token = { line: true };
    else if (first === "*" || first === "_" || first === "~") token = delimiter(text, mark, start);
    else if (first === "<") token = /^<br/i.test(mark) ? { line: true } : address(mark.slice(1, -1), mark);
    else if (mark === "[" || mark === "![") {
      token = { text: mark, labelStart: end, image: mark === "![" };
      brackets.push(token);
    } else if (mark === "]") {
      const opener = brackets.pop();
      token = { text: "]" };
      LINK_TARGET.lastIndex = end;
      const target = opener && text[end] === "(" && LINK_TARGET.exec(text);
      const url = target && safeUrl(target[1]);
      const label = opener && text.slice(opener.labelStart, start);
      if (url) {
        opener.url = url;
        token.ends = "link";
        end = LINK_TARGET.lastIndex;
        brackets.length = 0;  // no link inside a link
      } else if (opener && /^\d{1,3}$/.test(label) && passages?.has(Number(label))) {
        opener.passage = Number(label);
        token.ends = "passage";
      }
    } else {
      const trimmed = trimAddress(mark);
      end = start + trimmed.length;
      token = address(trimmed, trimmed);
    }
    if (start > done) result.push({ text: text.slice(done, start) });
    token.at = start;
    result.push(token);
    done = end;
    MARK.lastIndex = end;
  }
  result.push({ text: text.slice(done), at: text.length });
  return result;
}

// In `` `a` `` the spaces next to the marks are not part of the code.
const unpadded = (code) => (code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code);

const address = (url, text) => (safeUrl(url) ? { link: safeUrl(url), text: url } : { text });

// Punctuation after an address belongs to the sentence, not to the address.
function trimAddress(url) {
  const end = url.slice(-80);
  let trimmed = end.replace(/[.,;:!?'"*_~\]]+$/, "");
  while (trimmed.endsWith(")") && trimmed.split(")").length > trimmed.split("(").length) {
    trimmed = trimmed.slice(0, -1).replace(/[.,;:!?'"*_~]+$/, "");
  }
  return url.slice(0, -80) + trimmed;
}

// $x^2$ by pandoc's rules: no space inside the dollar signs and no digit after them, so that prices are not formulas.
function formula(text, mark, start) {
  const from = start + mark.length;
  const line = text.slice(from, from + 400);
  const close = line.indexOf(mark);
  if (close < 1 || (mark === "$" && !/^\S([^\n]*[^\s\\])?\$(?!\d)/.test(line.slice(0, close + 2)))) return { text: mark };
  return { formula: line.slice(0, close), end: from + close + mark.length };
}

// CommonMark 6.2: the characters before and after a run of marks decide whether it can open or close emphasis.
function delimiter(text, mark, start) {
  const before = text[start - 1] ?? " ";
  const after = text[start + mark.length] ?? " ";
  const space = /\s/;
  const punctuation = /[\p{P}\p{S}]/u;
  const beforeIsBoundary = space.test(before) || punctuation.test(before);
  const afterIsBoundary = space.test(after) || punctuation.test(after);
  const leftFlanking = !space.test(after) && (!punctuation.test(after) || beforeIsBoundary);
  const rightFlanking = !space.test(before) && (!punctuation.test(before) || afterIsBoundary);
  const isUnderscore = mark[0] === "_";  // which does not open or close inside a word
  const opens = leftFlanking && (!isUnderscore || !rightFlanking || punctuation.test(before));
  const closes = rightFlanking && (!isUnderscore || !leftFlanking || punctuation.test(after));
  // `count`: how many characters of the run are not paired yet; `openTags`, `closeTags`: elements that begin and end here.
  return { mark: mark[0], count: mark.length, runLength: mark.length, opens, closes, openTags: [], closeTags: [] };
}

const EMPHASIS = [[], ["em"], ["strong"], ["em", "strong"]];  // elements of a run of * or _, by its length

// Pairs the marks (CommonMark's "process emphasis"): fills their `openTags` and `closeTags`. Emphasis does not cross the
// boundary of a link. `recent`: marks that are still open this close to the end are closed there.
function pairMarks(tokens, recent) {
  const openers = [];  // a stack
  const openersBottom = new Map();  // kind of mark -> height of the stack below which it has no partner: do not search again
  const truncateOpeners = (height) => {
    openers.length = height;
    for (const [key, bottom] of openersBottom) if (bottom > height) openersBottom.set(key, height);
  };
  const linkBottoms = [];  // for each link that is open, the height of the stack at its beginning
  for (const token of tokens) {
    if (token.url || token.passage) linkBottoms.push(openers.length);
    if (token.ends) truncateOpeners(Math.min(linkBottoms.pop(), openers.length));
    if (!token.mark) continue;
    while (token.closes && token.count) {
      const key = `${token.mark}${token.opens}${token.runLength % 3}${linkBottoms.length}`;
      const bottom = Math.max(openersBottom.get(key) ?? 0, linkBottoms.at(-1) ?? 0);
      let index = openers.length - 1;
      while (index >= bottom && !arePartners(openers[index], token)) index -= 1;
      if (index < bottom) {
        openersBottom.set(key, openers.length);
        break;
      }
      const opener = openers[index];
      const isDouble = token.mark === "~" || (opener.count > 1 && token.count > 1);
      const [name] = token.mark === "~" ? ["del"] : EMPHASIS[isDouble ? 2 : 1];
      opener.openTags.unshift(name);
      token.closeTags.push(name);
      opener.count -= isDouble ? 2 : 1;
      token.count -= isDouble ? 2 : 1;
      truncateOpeners(opener.count ? index + 1 : index);
    }
    if (token.opens && token.count) openers.push(token);
  }
  for (const opener of openers) {
    if (!recent || tokens.at(-1).at - opener.at > recent || opener.count > 3) continue;
    opener.openTags.unshift(...(opener.mark === "~" ? ["del"] : EMPHASIS[opener.count]));
    opener.count = 0;
  }
}

// CommonMark's "rule of three": if one of the runs can both open and close, the sum of their lengths must not be a multiple
// of three, unless both lengths are.
function arePartners(opener, closer) {
  if (opener.mark !== closer.mark) return false;
  const isMultipleOfThree = (opener.runLength + closer.runLength) % 3 === 0;
  const areMultiplesOfThree = opener.runLength % 3 === 0 && closer.runLength % 3 === 0;
  const isAmbiguous = opener.closes || closer.opens;
  return !isAmbiguous || !isMultipleOfThree || areMultiplesOfThree;
}

function build(target, tokens) {
  const stack = [target];
  let pendingText = "";
  let insideLink = false;
  const append = (node) => {
    if (pendingText) stack.at(-1).append(pendingText);
    pendingText = "";
    if (node) stack.at(-1).append(node);
  };
  const enter = (element) => {
    const isTooDeep = stack.length > MAX_DEPTH;  // then its content goes into the element around it
    append(isTooDeep ? null : element);
    stack.push(isTooDeep ? stack.at(-1) : element);
  };
  const leave = () => {
    append();
    stack.pop();
  };
  for (const token of tokens) {
    if (token.mark) {
      token.closeTags.forEach(leave);
      pendingText += token.mark.repeat(token.count);
      for (const name of token.openTags) enter(el(name));
    } else if (token.passage) {
      pendingText = pendingText.trimEnd();  // the number is attached to the word before it
      enter(cite(token.passage));
    } else if (token.url) {
      enter(link(token.url));
      insideLink = true;
      if (token.image) pendingText += "Image: ";  // a link; images are never fetched
    } else if (token.ends) {
      if (token.ends === "link") {
        if (!pendingText && !stack.at(-1).textContent) pendingText = stack.at(-1).href ?? "";
        insideLink = false;
      }
      leave();
    } else if (token.link && !insideLink) append(link(token.link, token.text));
    else if (token.code !== undefined) append(el("code", {}, token.code));
    else if (token.formula !== undefined) append(el("code", { class: "formula" }, token.formula));
    else if (token.line) append(el("br"));
    else pendingText += token.text;
  }
  append();
}

const cite = (number) =>
  el("button", { type: "button", class: "cite", "data-passage": number, "aria-label": `Passage ${number}` });

// The tooltip shows the address, because the text of a link may claim another one.
const link = (url, ...text) => el("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer" }, ...text);
