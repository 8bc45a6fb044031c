// The conversation on the page: sending, answers as they come, branches.

import { announce, Announcer } from "./announce.js";
import { chat, chatBody } from "./api.js";
import { byId, copyText, el } from "./dom.js";
import { Answer, userMessage } from "./message.js";
import { load, newConversation, save } from "./store.js";
import { add, ancestry, change, messages, newId, path, ROOT, siblings, textOf, titleFrom, turn, without } from "./tree.js";

const SAVE_EVERY = 400;  // milliseconds: what is lost of an answer when the page is closed while it comes
const NEAR_END = 60;  // pixels from the end within which a reader counts as following

export class Chat {
  // `page`: what this needs to know of the rest: {knowsTools(model), defaults(), shown(), changed(conversation)}.
  constructor(page) {
    this.page = page;
    this.running = new Map();  // id of a conversation -> what is being answered in it, also while another is shown
    this.drawn = new Map();  // id of a node -> how it stands on the page: {node, versions, element, answer}
    this.scroller = byId("scroller");
    this.thread = byId("thread");
    this.conversation = newConversation();
    this.following = true;
    this.opening = 0;  // counts what was opened, so that what loads late does not cover what came after
    this.scroller.addEventListener("scroll", () => this.scrolled());
    this.thread.addEventListener("click", (event) => this.clicked(event));
    byId("to-end").addEventListener("click", () => this.toEnd());
    this.act = {
      copy: (node, button) => copyText(textOf(node), button),
      edit: (node, text, bar) => this.edit(node, text, bar),
      again: (node) => this.again(node),
      turn: (node, by) => this.turn(node, by),
    };
  }

  get busy() {
    return this.running.has(this.conversation.id);
  }

  async open(id) {
    const turn = ++this.opening;
    const found = this.running.get(id)?.conversation ?? (id && (await load(id)));
    if (turn === this.opening) this.show(found || newConversation(this.page.defaults()));
    return Boolean(found);
  }

  // The object that holds a conversation while it is shown or answered; what is stored may be older.
  live(id) {
    return this.running.get(id)?.conversation ?? (id === this.conversation.id ? this.conversation : null);
  }

  show(conversation) {
    this.conversation = conversation;
    this.draw();
    this.toEnd();
    this.page.shown();
  }

  // Messages that are as they were keep their elements: a long conversation is not built again for every word in it.
  draw() {
    const { tree } = this.conversation;
    const before = this.drawn;
    this.drawn = new Map();
    for (const node of path(tree)) {
      const versions = siblings(tree, node.id).join();
      const known = before.get(node.id);
      const same = known?.node === node && known.versions === versions;
      this.drawn.set(node.id, same ? known : { node, versions, ...this.made(node) });
    }
    byId("empty").hidden = this.drawn.size > 0;
    this.thread.replaceChildren(...[...this.drawn.values()].map(({ element }) => element));
  }

  made(node) {
    const { tree } = this.conversation;
    if (node.role === "user") return { element: userMessage(node, tree, this.act) };
    // A page that was closed in mid-answer has saved an answer without an end.
    const current = node.finish === undefined && !this.busy ? { ...node, finish: "stopped" } : node;
    const answer = new Answer(current, tree, this.act);
    return { element: answer.element, answer };
  }

  // ── what the reader does ──

  send(text) {
    const { tree } = this.conversation;
    this.ask(path(tree).at(-1)?.id ?? ROOT, text);
  }

  ask(parent, text) {
    const { conversation } = this;
    const node = { id: newId(), parent, role: "user", text };
    conversation.tree = add(conversation.tree, node);
    conversation.title ||= titleFrom(text);
    this.answer(node.id);
  }

  again(node) {
    if (this.busy) return;
    // An attempt that brought nothing but an error is no version worth keeping.
    if (node.error && !node.parts.length) this.conversation.tree = without(this.conversation.tree, node.id);
    this.answer(node.parent);
  }

  async turn(node, by) {
    if (this.busy) return;
    const { conversation } = this;
    conversation.tree = turn(conversation.tree, node.id, by);
    const scrolled = this.scroller.scrollTop;
    this.draw();
    this.scroller.scrollTop = scrolled;
    const now = this.thread.querySelector(`[data-id="${conversation.tree.chosen[node.parent]}"]`);
    const same = now.querySelector(`[data-turn="${by}"]:not(:disabled)`) ?? now.querySelector("[data-turn]:not(:disabled)");
    same?.focus();
    announce(`Version ${now.querySelector(".count").textContent}`);
    await save(conversation);
    this.page.shown();
  }

  edit(node, text, bar) {
    if (this.busy) return;
    const rows = Math.min(12, node.text.split("\n").length + 1);
    const box = el("textarea", { "aria-label": "Edit your message", rows, dir: "auto" });
    box.value = node.text;
    const close = () => {
      form.replaceWith(text);
      bar.hidden = false;
      bar.querySelector("button:not(:disabled)").focus();
    };
    const submit = (event) => {
      event?.preventDefault();
      if (box.value.trim() && !this.busy) this.ask(node.parent, box.value.trim());
    };
    const form = el("form", { class: "edit", on: { submit } }, box, el("div", {},
      el("button", { type: "button", class: "plain", on: { click: close } }, "Cancel"),
      el("button", { class: "main" }, "Ask again")));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") (event.stopPropagation(), close());
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    });
    text.replaceWith(form);
    bar.hidden = true;
    box.focus();
  }

  editLast() {
    const last = [...this.thread.querySelectorAll(".user")].at(-1);
    last?.querySelector('[aria-label^="Edit"]').click();
  }

  stop() {
    this.running.get(this.conversation.id)?.controller.abort();
  }

  forget(id) {
    this.running.get(id)?.controller.abort();
    this.running.delete(id);
  }

  // ── answers ──

  async answer(parent) {
    const { conversation } = this;
    const { settings } = conversation;
    const node = { id: newId(), parent, role: "assistant", model: settings.model, parts: [] };
    const line = ancestry(conversation.tree, parent);
    conversation.tree = add(conversation.tree, node);
    conversation.updated = Date.now();
    const controller = new AbortController();
    const writer = new Writer(this, conversation, node);
    this.running.set(conversation.id, { conversation, controller });
    this.draw();
    this.toEnd();
    this.page.changed(conversation);
    announce(`${settings.model} is answering.`);
    const knows = this.page.knowsTools(settings.model);
    try {
      const body = chatBody(settings, messages(line, settings.system, knows), knows);
      for await (const chunk of chat(body, controller.signal)) writer.take(chunk);
      node.finish ??= "stop";
    } catch (error) {
      node.finish = error.name === "AbortError" ? "stopped" : "error";
      if (node.finish === "error") node.error = error.message;
    }
    this.running.delete(conversation.id);
    writer.close();
    this.page.changed(conversation);
  }

  // ── where the reader is ──

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR_END;
    byId("to-end").hidden = this.following;
  }

  // Asked before something is drawn: a reader may have turned back without the browser having said so yet.
  follows() {
    return this.following && this.scroller.scrollTop > this.top - 4;
  }

  toEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.top = this.scroller.scrollTop;
  }

  clicked({ target }) {
    const code = target.closest(".copy-code");
    if (code) copyText(code.closest(".code").querySelector("code").textContent, code);
    const cite = target.closest(".cite");
    if (cite) {
      const note = cite.closest(".message").querySelector(`.notes [data-note="${cite.dataset.note}"]`);
      note.open = true;
      note.querySelector("summary").focus();
    }
  }
}

// Takes chunks into a node, and shows and saves it no more often than eyes and disks need.
class Writer {
  constructor(chat, conversation, node) {
    Object.assign(this, { chat, conversation, node });
    this.announcer = new Announcer();
    this.saved = 0;
    this.frame = null;
    this.cost = 0;  // milliseconds that drawing took last
  }

  take(chunk) {
    const { parts } = this.node;
    const choice = chunk.choices[0];
    if (choice?.delta.content) {
      if (parts.at(-1)?.text === undefined) parts.push({ text: "" });
      parts.at(-1).text += choice.delta.content;
      if (this.visible) this.announcer.feed(choice.delta.content);
    }
    for (const call of choice?.delta.tool_calls ?? []) {
      if (call.id) parts.push({ call: { id: call.id, name: call.function.name, arguments: call.function.arguments ?? "" } });
      else parts.at(-1).call.arguments += call.function.arguments ?? "";
    }
    if (chunk.tool_result) {
      const { tool_call_id: id, content, passages = [] } = chunk.tool_result;
      const part = parts.findLast((one) => one.call?.id === id);
      if (part) part.call = { ...part.call, content, passages };
    }
    if (choice?.finish_reason) this.node.finish_reason = choice.finish_reason;
    if (chunk.timings) this.node.timings = chunk.timings;
    // A block that takes long to draw is drawn more rarely, so that the page always answers its reader.
    this.frame ??= setTimeout(() => this.draw(), Math.max(16, this.cost * 4));
    if (Date.now() - this.saved > SAVE_EVERY) this.save();
  }

  get visible() {
    return this.chat.conversation === this.conversation;
  }

  draw() {
    this.frame = null;
    const answer = this.chat.drawn.get(this.node.id)?.answer;
    if (!answer || !this.visible) return;
    const start = performance.now();
    const follows = this.chat.follows();
    answer.update(this.node, this.conversation.tree, this.node.finish === undefined);
    if (follows) this.chat.toEnd();
    this.cost = performance.now() - start;
  }

  save() {
    this.saved = Date.now();
    this.conversation.tree = change(this.conversation.tree, this.node.id, this.node);
    save(this.conversation);
  }

  close() {
    clearTimeout(this.frame);
    const { node } = this;
    if (node.finish === "stop" && node.finish_reason === "length") node.finish = "length";
    delete node.finish_reason;
    this.conversation.updated = Date.now();
    this.save();
    this.draw();
    if (!this.visible) return;
    this.announcer.finish();
    if (node.error) announce(node.error);
    if (node.finish === "stopped") announce("Stopped.");
  }
}
