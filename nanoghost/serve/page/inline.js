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
const TARGET = /\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"\n]*"|'[^'\n]*'))?\s*\)/y;

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
  build(target, pair(tokens(writing ? tidy(text) : text, passages, recent), recent));
}

// An incomplete mark or address at the end of an incomplete text is not shown yet.
function tidy(text) {
  const label = (whole, words, rest) => (rest === "]" && /^\d*$/.test(words) ? whole : words);  // [1] may be a citation
  const end = text.slice(-RECENT).replace(/!?\[([^\]\n]*)(\]\([^)\s]*|\])?$/, label).replace(/[*_~`]+$/, "");
  return text.slice(0, -RECENT) + end;
}

function tokens(text, passages, recent) {
  const result = [];
  const brackets = [];
  const missing = new Set();  // closing marks that do not occur again, so that each is searched only once
  let at = 0;
  const closing = (mark, from) => {
    if (missing.has(mark)) return -1;
    const place = text.indexOf(mark, from);
    if (place < 0) missing.add(mark);
    return place;
  };
  MARK.lastIndex = 0;
  for (let match; (match = MARK.exec(text)); ) {
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
        let past = close;  // a longer run of backticks is another mark: skip it
        while (text[past] === "`") past += 1;
        close = closing(mark, past);
      }
      if (close < 0 && recent && text.length - start < recent && mark.length < 3) close = text.length;
      token = close < 0 ? { text: mark } : { code: unpadded(text.slice(end, close)) };
      if (close >= 0) end = close + mark.length;
    } else if (first === "$") token = formula(text, mark, start, (past) => (end = past));
    else if (first === "\n") token = { line: true };
    else if (first === "*" || first === "_" || first === "~") token = delimiter(text, mark, start);
    else if (first === "<") token = /^<br/i.test(mark) ? { line: true } : address(mark.slice(1, -1), mark);
    else if (mark === "[" || mark === "![") {
      token = { text: mark, after: end, image: mark === "![" };
      brackets.push(token);
    } else if (mark === "]") {
      const opener = brackets.pop();
      token = { text: "]" };
      TARGET.lastIndex = end;
      const target = opener && text[end] === "(" && TARGET.exec(text);
      const url = target && safeUrl(target[1]);
      const label = opener && text.slice(opener.after, start);
      if (url) {
        opener.url = url;
        token.ends = "link";
        end = TARGET.lastIndex;
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
    if (start > at) result.push({ text: text.slice(at, start) });
    token.at = start;
    result.push(token);
    at = MARK.lastIndex = end;
  }
  result.push({ text: text.slice(at), at: text.length });
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
function formula(text, mark, start, endsAt) {
  const from = start + mark.length;
  const line = text.slice(from, from + 400);
  const close = line.indexOf(mark);
  if (close < 1 || (mark === "$" && !/^\S([^\n]*[^\s\\])?\$(?!\d)/.test(line.slice(0, close + 2)))) return { text: mark };
  endsAt(from + close + mark.length);
  return { formula: line.slice(0, close) };
}

// CommonMark 6.2: the characters before and after a run of marks decide whether it can open or close emphasis.
function delimiter(text, mark, start) {
  const before = text[start - 1] ?? " ";
  const after = text[start + mark.length] ?? " ";
  const space = /\s/;
  const sign = /[\p{P}\p{S}]/u;
  const left = !space.test(after) && (!sign.test(after) || space.test(before) || sign.test(before));
  const right = !space.test(before) && (!sign.test(before) || space.test(after) || sign.test(after));
  const word = mark[0] === "_";
  const opens = left && (!word || !right || sign.test(before));
  const closes = right && (!word || !left || sign.test(after));
  return { mark: mark[0], count: mark.length, whole: mark.length, opens, closes, begin: [], end: [] };
}

// Pair the marks (CommonMark's "process emphasis"); emphasis does not cross the boundary of a link. `recent`: marks that are
// still open this close to the end are closed there.
function pair(list, recent) {
  const stack = [];
  const bottoms = new Map();  // below this height of the stack there is no partner for such a mark: do not search again
  const cut = (height) => {
    stack.length = height;
    for (const [key, value] of bottoms) if (value > height) bottoms.set(key, height);
  };
  const boundaries = [];
  for (const token of list) {
    if (token.url || token.passage) boundaries.push(stack.length);
    if (token.ends) cut(Math.min(boundaries.pop(), stack.length));
    if (!token.mark) continue;
    while (token.closes && token.count) {
      const key = `${token.mark}${token.opens}${token.whole % 3}${boundaries.length}`;
      const bottom = Math.max(bottoms.get(key) ?? 0, boundaries.at(-1) ?? 0);
      let at = stack.length - 1;
      while (at >= bottom && !partners(stack[at], token)) at -= 1;
      if (at < bottom) {
        bottoms.set(key, stack.length);
        break;
      }
      const opener = stack[at];
      const size = token.mark === "~" || (opener.count > 1 && token.count > 1) ? 2 : 1;
      const name = token.mark === "~" ? "del" : size === 2 ? "strong" : "em";
      opener.begin.unshift(name);
      token.end.push(name);
      opener.count -= size;
      token.count -= size;
      cut(opener.count ? at + 1 : at);
    }
    if (token.opens && token.count) stack.push(token);
  }
  for (const token of stack) {
    if (!recent || list.at(-1).at - token.at > recent || token.count > 3) continue;
    token.begin.unshift(...(token.mark === "~" ? ["del"] : [[], ["em"], ["strong"], ["em", "strong"]][token.count]));
    token.count = 0;
  }
  return list;
}

function partners(opener, closer) {
  if (opener.mark !== closer.mark) return false;
  const odd = (opener.whole + closer.whole) % 3 === 0 && (opener.whole % 3 || closer.whole % 3);
  return !((opener.closes || closer.opens) && odd);
}

function build(target, list) {
  const stack = [target];
  let pending = "";
  let linked = false;
  const put = (node) => {
    if (pending) stack.at(-1).append(pending);
    pending = "";
    if (node) stack.at(-1).append(node);
  };
  const enter = (element) => {
    const deep = stack.length > MAX_DEPTH;
    put(deep ? null : element);
    stack.push(deep ? stack.at(-1) : element);
  };
  const leave = () => {
    put();
    stack.pop();
  };
  for (const token of list) {
    if (token.mark) {
      token.end.forEach(leave);
      pending += token.mark.repeat(token.count);
      for (const name of token.begin) enter(el(name));
    } else if (token.passage) {
      pending = pending.trimEnd();  // the number is attached to the word before it
      enter(cite(token.passage));
    } else if (token.url) {
      enter(link(token.url));
      linked = true;
      if (token.image) pending += "Image: ";  // a link; images are never fetched
    } else if (token.ends) {
      if (token.ends === "link") {
        if (!pending && !stack.at(-1).textContent) pending = stack.at(-1).href ?? "";
        linked = false;
      }
      leave();
    } else if (token.link && !linked) put(link(token.link, token.text));
    else if (token.code !== undefined) put(el("code", {}, token.code));
    else if (token.formula !== undefined) put(el("code", { class: "formula" }, token.formula));
    else if (token.line) put(el("br"));
    else pending += token.text;
  }
  put();
}

const cite = (number) =>
  el("button", { type: "button", class: "cite", "data-passage": number, "aria-label": `Passage ${number}` });

// The tooltip shows the address, because the text of a link may claim another one.
const link = (url, ...text) => el("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer" }, ...text);
