// One message as it stands on the page, and how it grows.

import { el, icon, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";
import { siblings, textOf } from "./tree.js";

// `act`: what the buttons do: {copy, edit, again, turn}, each with the node.
export function userMessage(node, tree, act) {
  const text = el("div", { class: "said", dir: "auto" }, node.text);
  const bar = el("div", { class: "actions" },
    iconButton("edit", "Edit: ask it otherwise", () => act.edit(node, text, bar)),
    iconButton("copy", "Copy message", (event) => act.copy(node, event.currentTarget)),
    branches(node, tree, act));
  return el("article", { class: "message user", "data-id": node.id }, el("h2", { class: "unseen" }, "You"), text, bar);
}

function branches(node, tree, act) {
  const all = siblings(tree, node.id);
  if (all.length < 2) return null;
  const at = all.indexOf(node.id);
  const arrow = (name, label, by, off) => iconButton(name, label, () => act.turn(node, by), { disabled: off, "data-turn": by });
  return el("span", { class: "branches", role: "group", "aria-label": "Versions" },
    arrow("left", "Earlier version", -1, at === 0),
    el("span", { class: "count" }, `${at + 1} / ${all.length}`),
    arrow("right", "Later version", 1, at === all.length - 1));
}

export class Answer {
  constructor(node, tree, act) {
    this.act = act;
    this.shown = [];  // for each part of the answer, what draws it
    this.notes = new Set();
    this.body = el("div", { class: "said prose", dir: "auto" });
    this.foot = el("div", { class: "foot" });
    this.element = el("article", { class: "message assistant", "data-id": node.id },
      el("h2", { class: "unseen" }, node.model), this.body, this.foot);
    this.update(node, tree, node.finish === undefined);
  }

  update(node, tree, writing) {
    node.parts.forEach((part, i) => {
      this.shown[i] ??= part.call ? new ToolCall(this.body) : new Text(this.body, this.notes);
      for (const passage of part.call?.passages ?? []) this.notes.add(passage.n);
      this.shown[i].update(part, writing && i === node.parts.length - 1);
    });
    this.element.classList.toggle("writing", writing);
    this.element.setAttribute("aria-busy", writing);
    this.element.classList.toggle("waiting", writing && !node.parts.length);
    if (!writing) this.close(node, tree);
  }

  close(node, tree) {
    const problem = node.error && el("p", { class: "problem" }, node.error, " ",
      el("button", { type: "button", class: "plain again", on: { click: () => this.act.again(node) } }, "Try again"));
    const bar = el("div", { class: "actions" }, branches(node, tree, this.act),
      textOf(node) ? iconButton("copy", "Copy answer", (event) => this.act.copy(node, event.currentTarget)) : null,
      iconButton("again", "Answer again", () => this.act.again(node)),
      figures(node));
    this.foot.replaceChildren(...[passages(node), problem, bar].filter(Boolean));
  }
}

class Text {
  constructor(body, notes) {
    this.box = el("div", { class: "text" });
    this.markdown = new Markdown(this.box, notes);
    this.ended = false;
    body.append(this.box);
  }

  update(part, writing) {
    if (this.ended) return;
    this.markdown.update(part.text, !writing);
    this.ended = !writing;
  }
}

class ToolCall {
  constructor(body) {
    this.line = el("span", { class: "call-line" });
    this.given = el("pre", { tabindex: "0" });
    this.result = el("pre", { tabindex: "0" });
    body.append(el("details", { class: "call" }, el("summary", {}, icon("right"), this.line),
      el("div", { class: "label" }, "Arguments"), this.given, el("div", { class: "label" }, "Result"), this.result));
  }

  update({ call }, writing) {
    const done = call.content !== undefined;
    const result = done ? firstLine(call.content) : writing ? "…" : "stopped";
    const names = { calculator: "Calculated", python: "Ran Python", lookup: "Looked up" };
    this.line.replaceChildren(el("span", { class: "tool-name" }, names[call.name] ?? call.name), " ",
      el("code", {}, firstLine(values(call.arguments))), call.passages?.length ? "" : ` → ${result}`);
    this.given.textContent = pretty(call.arguments);
    this.result.textContent = done ? call.content : result;
  }
}

const firstLine = (text) => {
  const line = text.trim().split("\n")[0];
  return line.length > 72 || line !== text.trim() ? `${line.slice(0, 72)}…` : line;
};

function values(given) {
  const parsed = parse(given);
  return parsed && typeof parsed === "object" ? Object.values(parsed).map(String).join(", ") : given;
}

// A program reads better with its line breaks than as JSON.
function pretty(given) {
  const parsed = parse(given);
  if (!parsed || typeof parsed !== "object") return given;
  return Object.entries(parsed).map(([name, value]) => {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    return text.includes("\n") ? `${name}:\n${text}` : `${name}: ${text}`;
  }).join("\n");
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;  // a small model's arguments need not be JSON; they are shown as they are
  }
}

function passages(node) {
  const found = node.parts.flatMap((part) => part.call?.passages ?? []);
  if (!found.length) return null;
  return el("section", { class: "notes", "aria-label": "Passages" }, found.map((passage) =>
    el("details", { "data-note": passage.n },
      el("summary", {}, el("span", { class: "number" }, String(passage.n)), passage.source,
        el("span", { class: "glimpse" }, passage.text.slice(0, 160))),
      el("blockquote", {}, passage.text))));
}

const whole = (n) => Math.round(n).toLocaleString("en");

function figures(node) {
  const { tokens_per_second: speed, first_token_seconds: first, context_used: used, context } = node.timings ?? {};
  const ends = { stopped: "stopped", length: "cut at the longest answer" };
  const said = [
    ends[node.finish],
    speed && `${speed < 10 ? speed.toFixed(1) : whole(speed)} tokens/s`,
    first !== undefined && `first after ${first.toFixed(first < 1 ? 2 : 1)} s`,
    used && context && `context ${whole(used)} of ${whole(context)}`,
  ].filter(Boolean).join(" · ");
  return el("span", { class: "figures" }, el("span", { class: "by" }, node.model, said && " · "), said);
}
