// The list of conversations: search, rename, delete with undo, files.

import { byId, download, el, iconButton, toast } from "./dom.js";
import { fromJson, load, loadAll, remove, restore, save, toJson, toMarkdown } from "./store.js";
import { find } from "./tree.js";

export class Sidebar {
  // `page`: {opened(): id of the conversation that is shown; live(id): the one in memory, if it is; replaced(id): what is
  // stored is another now, or gone; deleted(id)}
  constructor(page) {
    this.page = page;
    this.list = byId("conversations");
    this.search = byId("search");
    this.search.addEventListener("input", () => this.draw());
    this.search.addEventListener("keydown", (event) => this.searchKey(event));
    byId("export-all").addEventListener("click", async () => this.exportAll());
    byId("import").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", ({ target }) => this.import(target));
    // Another tab may have changed the list.
    this.others = new BroadcastChannel("nanoghost");
    this.others.addEventListener("message", ({ data }) => (this.draw(), this.page.replaced(data)));
    this.drawing = 0;
  }

  async changed(id) {
    this.others.postMessage(id);
    await this.draw();
  }

  async draw() {
    const query = this.search.value.trim();
    const turn = ++this.drawing;
    const all = await loadAll();
    if (turn !== this.drawing || this.list.querySelector(".rename")) return;  // asked again meanwhile; somebody writes there
    const found = all.map((one) => [one, query ? find(one, query) : ""]).filter(([, excerpt]) => excerpt !== null);
    this.list.replaceChildren(...found.map(([one, excerpt]) => this.row(one, excerpt, query)));
    byId("nothing-found").textContent = query && !found.length ? "Nothing found." : !all.length ? "Nothing said yet." : "";
  }

  row(conversation, excerpt, query) {
    const current = conversation.id === this.page.opened();
    return el("li", { "data-id": conversation.id },
      el("a", { href: `#/c/${conversation.id}`, "aria-current": current ? "page" : null },
        el("span", { class: "title" }, conversation.title), excerpt ? marked(excerpt, query) : null),
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
    if (event.key === "ArrowDown" && links[0]) (event.preventDefault(), links[0].focus());
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
    const finish = async (keep) => {
      box.onblur = null;
      box.remove();
      const title = box.value.trim();
      if (keep && title) {
        const now = this.page.live(id) ?? (await load(id));
        now.title = title;
        await save(now);
        this.page.replaced(id);
      }
      await this.changed(id);
      this.list.querySelector(`[data-id="${CSS.escape(id)}"] a`)?.focus();
    };
    box.onblur = () => finish(true);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") (event.stopPropagation(), finish(false));
    });
    row.replaceChildren(box);
    box.focus();
    box.select();
  }

  async delete(id) {
    const conversation = await load(id);
    if (!conversation) return;
    await remove(id);
    this.page.deleted(id);
    this.page.replaced(id);
    await this.changed(id);
    byId("new-chat").focus();
    toast(`Deleted “${conversation.title}”.`, "Undo", async () => {
      await restore(conversation);
      await this.changed(id);
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
    let read;
    try {
      read = fromJson(await file.text());
    } catch (error) {
      toast(error.message);
      return;
    } finally {
      input.value = "";  // so that the same file can be chosen again
    }
    let taken = 0;
    for (const conversation of read) {
      const known = await load(conversation.id);
      if (known && known.updated >= conversation.updated) continue;
      await restore(conversation);
      this.page.replaced(conversation.id);
      this.others.postMessage(conversation.id);
      taken += 1;
    }
    const kept = read.length - taken;
    toast(`${taken} ${taken === 1 ? "conversation" : "conversations"} imported${kept ? `; ${kept} were here already` : ""}.`);
    await this.draw();
  }
}

function marked(excerpt, query) {
  const at = excerpt.toLowerCase().indexOf(query.toLowerCase());
  if (at < 0) return el("span", { class: "excerpt" }, excerpt);
  const end = at + query.length;
  return el("span", { class: "excerpt" }, excerpt.slice(0, at), el("mark", {}, excerpt.slice(at, end)), excerpt.slice(end));
}
