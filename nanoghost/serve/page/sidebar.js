// The list of conversations: search, rename, delete with undo, files.

import { byId, download, el, iconButton, toast } from "./dom.js";
import { fromJson, load, loadAll, remove, restore, save, toJson, toMarkdown } from "./store.js";
import { find } from "./tree.js";

export class Sidebar {
  // `page`: callbacks to the rest of the page:
  //   openId()        id of the conversation that is shown
  //   inMemory(id)    the conversation object, if it is in use
  //   onStored(id)    the stored conversation was changed or deleted
  //   onDeleted(id)   it was deleted in this tab
  constructor(page) {
    this.page = page;
    this.list = byId("conversations");
    this.search = byId("search");
    this.search.addEventListener("input", () => this.draw());
    this.search.addEventListener("keydown", (event) => this.searchKey(event));
    byId("export-all").addEventListener("click", async () => this.exportAll());
    byId("import").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", ({ target }) => this.import(target));
    // Another tab may change the list.
    this.otherTabs = new BroadcastChannel("nanoghost");
    this.otherTabs.addEventListener("message", ({ data: id }) => {
      this.draw();
      this.page.onStored(id);
    });
    this.drawCount = 0;  // so that a slow draw does not replace a later one
  }

  // Called when this tab has changed a stored conversation.
  async onChange(id) {
    this.otherTabs.postMessage(id);
    await this.draw();
  }

  async draw() {
    const query = this.search.value.trim().normalize("NFKC");
    const count = ++this.drawCount;
    const all = await loadAll();
    const isRenaming = this.list.querySelector(".rename");
    if (count !== this.drawCount || isRenaming) return;
    const withExcerpts = all.map((conversation) => [conversation, query ? find(conversation, query) : ""]);
    const matches = withExcerpts.filter(([, excerpt]) => excerpt !== null);
    this.list.replaceChildren(...matches.map(([conversation, excerpt]) => this.row(conversation, excerpt, query)));
    const noMatch = query && !matches.length ? "No results." : "";
    byId("search-status").textContent = all.length ? noMatch : "No conversations yet.";
  }

  row(conversation, excerpt, query) {
    const current = conversation.id === this.page.openId();
    return el("li", { "data-id": conversation.id },
      el("a", { href: `#/c/${conversation.id}`, "aria-current": current ? "page" : null },
        el("span", { class: "title" }, conversation.title), excerpt ? highlight(excerpt, query) : null),
      el("span", { class: "row-actions" },
        iconButton("edit", `Rename “${conversation.title}”`, () => this.rename(conversation.id)),
        iconButton("bin", `Delete “${conversation.title}”`, () => this.delete(conversation.id))));
  }

  searchKey(event) {
    const links = [...this.list.querySelectorAll("a")];
    if (event.key === "Enter") {
      if (!this.search.value.trim()) location.hash = "#/";
      else if (links[0]) links[0].click();
    }
    if (event.key === "ArrowDown" && links[0]) {
      event.preventDefault();
      links[0].focus();
    }
    if (event.key === "Escape" && this.search.value) {
      event.stopPropagation();
      this.search.value = "";
      this.draw();
    }
  }

  async rename(id) {
    const conversation = await load(id);
    if (this.search.value) {
      this.search.value = "";
      await this.draw();
    }
    const row = this.list.querySelector(`[data-id="${CSS.escape(id)}"]`);
    const box = el("input", { "aria-label": "Title", class: "rename", maxlength: "120" });
    box.value = conversation.title;
    const finish = async (accept) => {
      box.onblur = null;
      box.remove();
      const title = box.value.trim();
      if (accept && title) {
        const current = this.page.inMemory(id) ?? (await load(id));
        current.title = title;
        await save(current);
        this.page.onStored(id);
      }
      await this.onChange(id);
      this.list.querySelector(`[data-id="${CSS.escape(id)}"] a`)?.focus();
    };
    box.onblur = () => finish(true);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    row.replaceChildren(box);
    box.focus();
    box.select();
  }

  async delete(id) {
    const conversation = await load(id);
    if (!conversation) return;
    await remove(id);
    this.page.onDeleted(id);
    this.page.onStored(id);
    await this.onChange(id);
    byId("new-chat").focus();
    const { person } = conversation.settings;
    const kept = person ? ` The chat log of ${person} keeps the messages.` : "";
    toast(`Deleted “${conversation.title}”.${kept}`, "Undo", async () => {
      await restore(conversation);
      await this.onChange(id);
      location.hash = `#/c/${id}`;
    });
  }

  // ── files ──

  async exportAll() {
    download("conversations.json", toJson(await loadAll()), "application/json");
  }

  async exportOne(id, asMarkdown) {
    const conversation = await load(id);
    if (!conversation) return;
    const name = conversation.title.replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || "conversation";
    if (asMarkdown) download(`${name}.md`, toMarkdown(conversation), "text/markdown");
    else download(`${name}.json`, toJson([conversation]), "application/json");
  }

  async import(input) {
    const [file] = input.files;
    if (!file) return;
    let conversations;
    try {
      conversations = fromJson(await file.text());
    } catch (error) {
      toast(error.message);
      return;
    } finally {
      input.value = "";  // so that the same file can be selected again
    }
    let numImported = 0;
    for (const conversation of conversations) {
      const existing = await load(conversation.id);
      if (existing && existing.updated >= conversation.updated) continue;
      await restore(conversation);
      this.page.onStored(conversation.id);
      this.otherTabs.postMessage(conversation.id);
      numImported += 1;
    }
    const numSkipped = conversations.length - numImported;
    const skipped = numSkipped ? `; ${numSkipped} already up to date` : "";
    toast(`${numImported} ${numImported === 1 ? "conversation" : "conversations"} imported${skipped}.`);
    await this.draw();
  }
}

function highlight(excerpt, query) {
  const start = excerpt.toLowerCase().indexOf(query.toLowerCase());
  if (start < 0) return el("span", { class: "excerpt" }, excerpt);
  const end = start + query.length;
  const match = el("mark", {}, excerpt.slice(start, end));
  return el("span", { class: "excerpt" }, excerpt.slice(0, start), match, excerpt.slice(end));
}
