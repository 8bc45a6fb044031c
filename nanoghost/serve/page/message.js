// The elements of one message, updated while a reply is generated.

import { el, icon, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";
import { siblings, textOf } from "./tree.js";

const TOOL_TITLES = { calculator: "Calculated", python: "Ran Python", lookup: "Looked up" };

// `actions`: what the buttons do with the node: {copy, edit, regenerate, showSibling}.
export function userMessage(node, tree, actions) {
  const text = el("div", { class: "content", dir: "auto" }, node.text);
  const bar = el("div", { class: "actions" },
    iconButton("edit", "Edit message", () => actions.edit(node, text, bar)),
    iconButton("copy", "Copy message", (event) => actions.copy(node, event.currentTarget)),
    branches(node, tree, actions));
  const heading = el("h2", { class: "visually-hidden" }, "You");
  return el("article", { class: "message user", "data-id": node.id }, heading, text, bar);
}

function branches(node, tree, actions) {
  const all = siblings(tree, node.id);
  if (all.length < 2) return null;
  const index = all.indexOf(node.id);
  const arrow = (name, label, offset, disabled) =>
    iconButton(name, label, () => actions.showSibling(node, offset), { disabled, "data-offset": offset });
  return el("span", { class: "branches", role: "group", "aria-label": "Versions" },
    arrow("left", "Previous version", -1, index === 0),
    el("span", { class: "count" }, `${index + 1} / ${all.length}`),
    arrow("right", "Next version", 1, index === all.length - 1));
}

export class Reply {
  constructor(node, tree, actions) {
    this.actions = actions;
    this.views = [];  // Text or ToolCall for each part of the reply
    this.passages = new Set();  // numbers that the text may cite
    this.body = el("div", { class: "content prose", dir: "auto" });
    this.foot = el("div", { class: "foot" });
    this.element = el("article", { class: "message assistant", "data-id": node.id },
      el("h2", { class: "visually-hidden" }, node.model), this.body, this.foot);
    this.update(node, tree, node.finish === undefined);
  }

  update(node, tree, writing) {
    node.parts.forEach((part, i) => {
      this.views[i] ??= part.call ? new ToolCall(this.body) : new Text(this.body, this.passages);
      for (const passage of part.call?.passages ?? []) this.passages.add(passage.n);
      this.views[i].update(part, writing && i === node.parts.length - 1);
    });
    this.element.classList.toggle("writing", writing);
    this.element.setAttribute("aria-busy", writing);
    this.element.classList.toggle("waiting", writing && !node.parts.length);
    if (!writing) this.close(node, tree);
  }

  close(node, tree) {
    const click = () => this.actions.regenerate(node);
    const retry = el("button", { type: "button", class: "text-button retry", on: { click } }, "Try again");
    const problem = node.error && el("p", { class: "problem" }, node.error, " ", retry);
    const bar = el("div", { class: "actions" }, branches(node, tree, this.actions),
      textOf(node) ? iconButton("copy", "Copy reply", (event) => this.actions.copy(node, event.currentTarget)) : null,
      iconButton("regenerate", "Regenerate reply", () => this.actions.regenerate(node)),
      figures(node));
    this.foot.replaceChildren(...[passageList(node), problem, bar].filter(Boolean));
  }
}

class Text {
  constructor(body, passages) {
    this.box = el("div", { class: "text" });
    this.markdown = new Markdown(this.box, passages);
    this.complete = false;
    body.append(this.box);
  }

  update(part, writing) {
    if (this.complete) return;
    this.markdown.update(part.text, !writing);
    this.complete = !writing;
  }
}

class ToolCall {
  constructor(body) {
    this.line = el("span", { class: "call-line" });
    this.arguments = el("pre", { tabindex: "0" });
    this.result = el("pre", { tabindex: "0" });
    body.append(el("details", { class: "call" }, el("summary", {}, icon("right"), this.line),
      el("div", { class: "label" }, "Arguments"), this.arguments, el("div", { class: "label" }, "Result"), this.result));
  }

  update({ call }, writing) {
    const done = call.content !== undefined;
    const placeholder = writing ? "…" : "stopped";
    const result = done ? firstLine(call.content) : placeholder;
    this.line.replaceChildren(el("span", { class: "tool-name" }, TOOL_TITLES[call.name] ?? call.name), " ",
      el("code", {}, firstLine(values(call.arguments))), call.passages?.length ? "" : ` → ${result}`);
    this.arguments.textContent = pretty(call.arguments);
    this.result.textContent = done ? call.content : placeholder;
  }
}

const firstLine = (text) => {
  const line = text.trim().split("\n")[0];
  return line.length > 72 || line !== text.trim() ? `${line.slice(0, 72)}…` : line;
};

function values(json) {
  const parsed = parse(json);
  return parsed && typeof parsed === "object" ? Object.values(parsed).map(String).join(", ") : json;
}

// Arguments as text instead of JSON, so that a program keeps its line breaks.
function pretty(json) {
  const parsed = parse(json);
  if (!parsed || typeof parsed !== "object") return json;
  return Object.entries(parsed).map(([name, value]) => {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    return text.includes("\n") ? `${name}:\n${text}` : `${name}: ${text}`;
  }).join("\n");
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;  // a small model may write arguments that are not JSON; they are shown unchanged
  }
}

function passageList(node) {
  const passages = node.parts.flatMap((part) => part.call?.passages ?? []);
  if (!passages.length) return null;
  return el("section", { class: "passages", "aria-label": "Passages" }, passages.map((passage) =>
    el("details", { "data-passage": passage.n },
      el("summary", {}, el("span", { class: "number" }, String(passage.n)), passage.source,
        el("span", { class: "preview" }, passage.text.slice(0, 160))),
      el("blockquote", {}, passage.text))));
}

const formatInteger = (n) => Math.round(n).toLocaleString("en");

function figures(node) {
  const { tokens_per_second: speed, first_token_seconds: first, context_used: used, context } = node.timings ?? {};
  const endings = { stopped: "stopped", length: "maximum length reached" };
  const text = [
    endings[node.finish],
    speed && `${speed < 10 ? speed.toFixed(1) : formatInteger(speed)} tokens/s`,
    first !== undefined && `first token after ${first.toFixed(first < 1 ? 2 : 1)} s`,
    used && context && `context ${formatInteger(used)} of ${formatInteger(context)}`,
  ].filter(Boolean).join(" · ");
  return el("span", { class: "figures" }, el("span", { class: "by" }, node.model, text && " · "), text);
}
