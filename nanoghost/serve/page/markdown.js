// Markdown to DOM elements, incrementally. The text is split into blocks (paragraphs, lists, code ...). A block that is
// followed by another cannot change any more and is built once; only the last block is rebuilt while text arrives.

import { el } from "./dom.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8;  // nested lists and quotes
const FENCE = /^( {0,8})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const FORMULA = /^ {0,3}(\$\$|\\\[)(.*)$/;

// Control characters and characters that change the text direction are replaced by U+FFFD.
const MISLEADING = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
const clean = (text) => text.replaceAll("\r", "").replace(MISLEADING, "\ufffd");

export class Markdown {
  // `passages`: a set of numbers that [1] in the text may cite.
  constructor(target, passages = null) {
    this.target = target;
    this.passages = passages;
    this.finalLength = 0;  // characters of the blocks that cannot change any more
    this.lastElements = [];  // elements of the text after them
  }

  // `source`: the whole text so far; each call must extend the text of the call before.
  update(source, finished = false) {
    const text = clean(source);
    if (!finished) this.buildCompleteBlocks(text);
    const parsed = blocks(text.slice(this.finalLength).split("\n"));
    if (!finished && this.growCode(parsed)) return;
    for (const node of this.lastElements) node.remove();
    this.lastElements = parsed.map((block, i) => this.element(block, !finished && i === parsed.length - 1));
    this.target.append(...this.lastElements);
    if (finished) {
      this.lastElements = [];
      this.finalLength = text.length;
    }
  }

  // Only whole lines count: an unfinished line is ambiguous, because "-" may become "-5" or a list.
  buildCompleteBlocks(text) {
    const end = text.lastIndexOf("\n") + 1;
    if (end <= this.finalLength) return;
    const lines = text.slice(this.finalLength, end - 1).split("\n");
    const parsed = blocks(lines);
    if (parsed.length < 2) return;
    for (const node of this.lastElements) node.remove();
    this.lastElements = [];
    this.target.append(...parsed.slice(0, -1).map((block) => this.element(block, false)));
    for (const line of lines.slice(0, parsed.at(-1).start)) this.finalLength += line.length + 1;
  }

  // A code block that only grew keeps its element, and with it its scroll position.
  growCode(parsed) {
    const [block] = parsed;
    const [node] = this.lastElements;
    if (parsed.length !== 1 || this.lastElements.length !== 1) return false;
    if (block.type !== "code" || node.dataset.language !== block.language) return false;
    node.querySelector("code").firstChild.data = block.text;
    return true;
  }

  // `writing`: the block is the last one of an incomplete text.
  element(block, writing) {
    const fill = (node, text) => {
      inline(node, text, { writing, passages: this.passages });
      return node;
    };
    const children = (inner) => inner.map((child, i) => this.element(child, writing && i === inner.length - 1));
    switch (block.type) {
      case "heading":
        // Levels 1 and 2 are the headings of the page and of each message.
        return fill(el(`h${Math.min(block.level + 2, 6)}`), block.text);
      case "rule":
        return el("hr");
      case "code":
        return codeElement(block);
      case "quote":
        return el("blockquote", {}, children(block.children));
      case "list": {
        const items = block.items.map((item, i) => {
          const last = writing && i === block.items.length - 1;
          // The first paragraph of an item has no element, so that nothing moves if a blank line follows.
          const [first, ...rest] = item;
          const li = el("li");
          if (first?.type === "paragraph") inline(li, first.text, { writing: last && !rest.length, passages: this.passages });
          else if (first) li.append(this.element(first, last && !rest.length));
          li.append(...rest.map((child, j) => this.element(child, last && j === rest.length - 1)));
          return li;
        });
        return el(block.ordered ? "ol" : "ul", { start: block.ordered && block.first !== 1 ? block.first : null }, items);
      }
      case "table": {
        const row = (cells, name) => el("tr", {}, cells.map((cell, i) => fill(el(name, { class: block.align[i] }), cell)));
        const body = block.rows.map((cells) => row(cells, "td"));
        const table = el("table", {}, el("thead", {}, row(block.head, "th")), el("tbody", {}, body));
        return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
      }
      default:
        return fill(el("p"), block.text);
    }
  }
}

function codeElement({ language, text }) {
  const copy = el("button", { type: "button", class: "copy-code" }, "Copy");
  const code = el("code", {}, document.createTextNode(text));
  return el("div", { class: "code", "data-language": language },
    el("div", { class: "code-head" }, el("span", {}, language), copy), el("pre", { tabindex: "0" }, code));
}

// ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const blank = (line) => !line.trim();
const indent = (line) => line.length - line.trimStart().length;
const isTable = (lines, i) =>
  i + 1 < lines.length && lines[i].includes("|") && TABLE_RULE.test(lines[i + 1])
  && cells(lines[i]).length === cells(lines[i + 1]).length;

// Whether this line interrupts a paragraph. A number does so only if it is 1, because sentences contain numbers.
function interrupts(lines, i) {
  const line = lines[i];
  if ([FENCE, HEADING, RULE, QUOTE, FORMULA].some((pattern) => pattern.test(line))) return true;
  const [, , marker, space] = ITEM.exec(line) ?? [];
  if (space && (!/\d/.test(marker) || parseInt(marker, 10) === 1)) return true;
  return isTable(lines, i);
}

// Blocks of these lines; `start` is the first line of each.
export function blocks(lines, depth = 0) {
  const result = [];
  let i = 0;
  const add = (block, next) => {
    result.push({ ...block, start: i });
    i = next;
  };
  while (i < lines.length) {
    const line = lines[i];
    let match;
    if (blank(line)) i += 1;
    else if ((match = FENCE.exec(line))) add(...fence(lines, i, match));
    else if ((match = FORMULA.exec(line))) add(...formula(lines, i, match));
    else if ((match = HEADING.exec(line))) add(heading(match), i + 1);
    else if (RULE.test(line)) add({ type: "rule" }, i + 1);
    else if (depth < MAX_DEPTH && QUOTE.test(line)) {
      let end = i;
      while (end < lines.length && QUOTE.test(lines[end])) end += 1;
      const inner = lines.slice(i, end).map((quoted) => quoted.replace(QUOTE, ""));
      add({ type: "quote", children: blocks(inner, depth + 1) }, end);
    } else if (depth < MAX_DEPTH && (match = ITEM.exec(line))) add(...list(lines, i, match, depth));
    else if (isTable(lines, i)) add(...table(lines, i));
    else {
      let end = i + 1;
      while (end < lines.length && !blank(lines[end]) && !interrupts(lines, end)) end += 1;
      add({ type: "paragraph", text: lines.slice(i, end).map((part) => part.trim()).join("\n") }, end);
    }
  }
  return result;
}

const heading = ([, marks, text = ""]) => ({
  type: "heading",
  level: marks.length,
  text: text.trim().replace(/(^|\s)#+$/, ""),
});

function fence(lines, i, [, margin, marks, language]) {
  let end = i + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= marks.length && text[0] === marks[0] && !text.replaceAll(marks[0], "");
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const text = lines.slice(i + 1, end).map((line) => line.slice(Math.min(indent(line), margin.length))).join("\n");
  return [{ type: "code", language: language.trim().split(/\s/)[0], text }, end + 1];
}

// A formula ends with its closing mark or, if that is missing, with the paragraph.
function formula(lines, i, [, mark, rest]) {
  const close = mark === "$$" ? "$$" : "\\]";
  const text = [];
  let line = rest;
  let end = i;
  for (;;) {
    const at = line.indexOf(close);
    text.push(at < 0 ? line : line.slice(0, at));
    end += 1;
    if (at >= 0) {
      const after = line.slice(at + 2).trim();
      if (after) text.push(after);
      break;
    }
    if (end >= lines.length || blank(lines[end])) break;
    line = lines[end];
  }
  return [{ type: "code", language: "formula", text: text.join("\n").trim() }, end];
}

// Content of an item is indented by two or more spaces: more tolerant than CommonMark, because models are not exact.
function list(lines, begin, first, depth) {
  const base = first[1].length;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let margin = 0;
  let i = begin;
  for (; i < lines.length; i += 1) {
    const line = lines[i];
    const item = RULE.test(line) ? null : ITEM.exec(line);
    if (blank(line)) {
      let next = i + 1;
      while (next < lines.length && blank(lines[next])) next += 1;
      if (next === lines.length) break;
      const following = RULE.test(lines[next]) ? null : ITEM.exec(lines[next]);
      const isSameKind = following && /\d/.test(following[2]) === ordered;
      if (!isSameKind && indent(lines[next]) <= base + 1) break;
      items.at(-1).push("");
      i = next - 1;
    } else if (item && item[1].length <= base + 1) {
      if (/\d/.test(item[2]) !== ordered) break;
      margin = item[0].length - (item[3]?.length > 4 ? item[3].length - 1 : 0);
      items.push([line.slice(margin)]);
    } else if (indent(line) > base + 1) {
      const contentIndent = Math.max(margin, base + 2);
      items.at(-1).push(line.slice(Math.min(indent(line), contentIndent)));
    } else if (blank(lines[i - 1]) || interrupts(lines, i)) break;
    else items.at(-1).push(line.trim());
  }
  const itemBlocks = items.map((itemLines) => blocks(itemLines, depth + 1));
  return [{ type: "list", ordered, first: parseInt(first[2], 10), items: itemBlocks }, i];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function alignment(dashes) {
  if (!dashes.endsWith(":")) return null;  // left
  return dashes.startsWith(":") ? "center" : "right";
}

function table(lines, i) {
  const align = cells(lines[i + 1]).map(alignment);
  let end = i + 2;
  while (end < lines.length && lines[end].includes("|") && !FENCE.test(lines[end])) end += 1;
  return [{ type: "table", align, head: cells(lines[i]), rows: lines.slice(i + 2, end).map(cells) }, end];
}
