// The conversation on the page: sending messages, streaming replies, branches.

import { announce, Announcer } from "./announce.js";
import { chat, chatBody } from "./api.js";
import { byId, copyText, el } from "./dom.js";
import { Reply, userMessage } from "./message.js";
import { load, newConversation, save } from "./store.js";
import {
  add, ancestry, change, messages, newId, path, ROOT, showSibling, siblings, textOf, titleFrom, without,
} from "./tree.js";

const SAVE_INTERVAL = 400;  // milliseconds; closing the page during a reply loses at most this much of it
const NEAR_END = 60;  // pixels; within this distance from the end, the view follows a reply

export class Chat {
  // `page`: callbacks to the rest of the page: {tools(settings), defaults(), update(), onChange(conversation)}.
  constructor(page) {
    this.page = page;
    this.running = new Map();  // conversation id -> {conversation, controller} of the reply that is generated in it
    this.drawn = new Map();  // node id -> its element on the page: {node, versions, element, reply}
    this.scroller = byId("scroller");
    this.thread = byId("thread");
    this.conversation = newConversation();
    this.following = true;
    this.endScrollTop = 0;  // scroll position at the end of the messages, when the view was last there
    this.openCount = 0;  // so that a conversation that loads slowly does not replace one opened later
    this.scroller.addEventListener("scroll", () => this.onScroll());
    this.thread.addEventListener("click", (event) => this.onClick(event));
    byId("to-end").addEventListener("click", () => this.scrollToEnd());
    this.actions = {
      copy: (node, button) => copyText(textOf(node), button),
      edit: (node, text, bar) => this.edit(node, text, bar),
      regenerate: (node) => this.regenerate(node),
      showSibling: (node, offset) => this.showSibling(node, offset),
    };
  }

  get busy() {
    return this.running.has(this.conversation.id);
  }

  async open(id) {
    const count = ++this.openCount;
    const conversation = this.running.get(id)?.conversation ?? (id && (await load(id)));
    if (count === this.openCount) this.show(conversation || newConversation(this.page.defaults()));
    return Boolean(conversation);
  }

  // The conversation object in memory, if it is shown or a reply is being generated; the stored one may be older.
  inMemory(id) {
    return this.running.get(id)?.conversation ?? (id === this.conversation.id ? this.conversation : null);
  }

  show(conversation) {
    this.conversation = conversation;
    this.draw();
    this.scrollToEnd();
    this.page.update();
  }

  // Unchanged messages keep their elements, so that a long conversation is not rebuilt for every change.
  draw() {
    const { tree } = this.conversation;
    const previouslyDrawn = this.drawn;
    this.drawn = new Map();
    for (const node of path(tree)) {
      const versions = siblings(tree, node.id).join();
      const previous = previouslyDrawn.get(node.id);
      const unchanged = previous?.node === node && previous.versions === versions;
      this.drawn.set(node.id, unchanged ? previous : { node, versions, ...this.elementOf(node) });
    }
    byId("empty").hidden = this.drawn.size > 0;
    this.thread.replaceChildren(...[...this.drawn.values()].map(({ element }) => element));
  }

  elementOf(node) {
    const { tree } = this.conversation;
    if (node.role === "user") return { element: userMessage(node, tree, this.actions) };
    // If the page was closed during a reply, the saved reply has no finish reason.
    const current = node.finish === undefined && !this.busy ? { ...node, finish: "stopped" } : node;
    const reply = new Reply(current, tree, this.actions);
    return { element: reply.element, reply };
  }

  // ── actions of the user ──

  send(text) {
    const { tree } = this.conversation;
    this.ask(path(tree).at(-1)?.id ?? ROOT, text);
  }

  ask(parent, text) {
    const { conversation } = this;
    const node = { id: newId(), parent, role: "user", text };
    conversation.tree = add(conversation.tree, node);
    conversation.title ||= titleFrom(text);
    this.generate(node.id);
  }

  regenerate(node) {
    if (this.busy) return;
    // A reply that consists of an error only is not kept as a version.
    if (node.error && !node.parts.length) this.conversation.tree = without(this.conversation.tree, node.id);
    this.generate(node.parent);
  }

  async showSibling(node, offset) {
    if (this.busy) return;
    const { conversation } = this;
    conversation.tree = showSibling(conversation.tree, node.id, offset);
    const scrollTop = this.scroller.scrollTop;
    this.draw();
    this.scroller.scrollTop = scrollTop;
    const sibling = this.thread.querySelector(`[data-id="${conversation.tree.chosen[node.parent]}"]`);
    const sameArrow = sibling.querySelector(`[data-offset="${offset}"]:not(:disabled)`);
    const arrow = sameArrow ?? sibling.querySelector("[data-offset]:not(:disabled)");
    arrow?.focus();
    announce(`Version ${sibling.querySelector(".count").textContent}`);
    await save(conversation);
    this.page.update();
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
      el("button", { type: "button", class: "text-button", on: { click: close } }, "Cancel"),
      el("button", { class: "primary" }, "Send")));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
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

  // ── replies ──

  async generate(parent) {
    const { conversation } = this;
    const { settings } = conversation;
    const node = { id: newId(), parent, role: "assistant", model: settings.model, parts: [] };
    const previousNodes = ancestry(conversation.tree, parent);
    conversation.tree = add(conversation.tree, node);
    conversation.updated = Date.now();
    const controller = new AbortController();
    const writer = new ReplyWriter(this, conversation, node);
    this.running.set(conversation.id, { conversation, controller });
    this.draw();
    this.scrollToEnd();
    this.page.onChange(conversation);
    announce(`${settings.model} is replying.`);
    const tools = this.page.tools(settings);
    try {
      const body = chatBody(settings, messages(previousNodes, settings.system, Boolean(tools)), tools);
      for await (const chunk of chat(body, controller.signal)) writer.add(chunk);
      node.finish = writer.finishReason === "length" ? "length" : "stop";
    } catch (error) {
      node.finish = error.name === "AbortError" ? "stopped" : "error";
      if (node.finish === "error") node.error = error.message;
    }
    this.running.delete(conversation.id);
    writer.close();
    this.page.onChange(conversation);
  }

  // ── scrolling ──

  onScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR_END;
    byId("to-end").hidden = this.following;
  }

  // Called before drawing: the user may have scrolled up, and the scroll event has not arrived yet.
  isFollowing() {
    return this.following && this.scroller.scrollTop > this.endScrollTop - 4;
  }

  scrollToEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.endScrollTop = this.scroller.scrollTop;
  }

  onClick({ target }) {
    const copyButton = target.closest(".copy-code");
    if (copyButton) copyText(copyButton.closest(".code").querySelector("code").textContent, copyButton);
    const cite = target.closest(".cite");
    if (cite) {
      const passages = cite.closest(".message").querySelector(".passages");
      const passage = passages.querySelector(`[data-passage="${cite.dataset.passage}"]`);
      passage.open = true;
      passage.querySelector("summary").focus();
    }
  }
}

// Adds chunks to the node of a reply, and draws and saves it at limited rates.
class ReplyWriter {
  constructor(chat, conversation, node) {
    Object.assign(this, { chat, conversation, node });
    this.announcer = new Announcer();
    this.finishReason = null;  // the server's
    this.saveTime = 0;
    this.drawTimer = null;
    this.drawDuration = 0;  // milliseconds that drawing took the last time
  }

  add(chunk) {
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
      const part = parts.findLast(({ call }) => call?.id === id);
      if (part) part.call = { ...part.call, content, passages };
    }
    if (choice?.finish_reason) this.finishReason = choice.finish_reason;
    if (chunk.timings) this.node.timings = chunk.timings;
    // The longer drawing takes, the less often it happens, so that the page stays responsive.
    this.drawTimer ??= setTimeout(() => this.draw(), Math.max(16, this.drawDuration * 4));
    if (Date.now() - this.saveTime > SAVE_INTERVAL) this.save();
  }

  get visible() {
    return this.chat.conversation === this.conversation;
  }

  draw() {
    this.drawTimer = null;
    const reply = this.chat.drawn.get(this.node.id)?.reply;
    if (!reply || !this.visible) return;
    const start = performance.now();
    const isFollowing = this.chat.isFollowing();
    reply.update(this.node, this.conversation.tree, this.node.finish === undefined);
    if (isFollowing) this.chat.scrollToEnd();
    this.drawDuration = performance.now() - start;
  }

  save() {
    this.saveTime = Date.now();
    this.conversation.tree = change(this.conversation.tree, this.node.id, this.node);
    save(this.conversation);
  }

  close() {
    clearTimeout(this.drawTimer);
    const { node } = this;
    this.conversation.updated = Date.now();
    this.save();
    this.draw();
    if (!this.visible) return;
    this.announcer.finish();
    if (node.error) announce(node.error);
    if (node.finish === "stopped") announce("Stopped.");
  }
}
