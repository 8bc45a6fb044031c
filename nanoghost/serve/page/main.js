// START READING HERE: data from the server, routing between views, keyboard shortcuts. The views are in their own files.

import { getJson, onKeyNeeded } from "./api.js";
import { Chat } from "./chat.js";
import { byId, icon } from "./dom.js";
import { Runs } from "./runs.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { save } from "./store.js";

const server = { models: [], people: [], tools: [] };
const box = byId("message");
const narrow = matchMedia("(max-width: 760px)");

const settings = new Settings(server, (fields) => {
  const { conversation } = chat;
  conversation.settings = { ...conversation.settings, ...fields };
  if (Object.keys(conversation.tree.nodes).length) save(conversation);
  update();
});

const chat = new Chat({
  tools: (values) => settings.tools(values),
  defaults: () => settings.defaults(),
  update: () => update(),
  async onChange(conversation) {
    if (conversation === chat.conversation) update();
    if (!Object.keys(conversation.tree.nodes).length) return;
    await save(conversation);
    await sidebar.onChange(conversation.id);
  },
});

const sidebar = new Sidebar({
  openId: () => (byId("chat").hidden ? null : chat.conversation.id),
  inMemory: (id) => chat.inMemory(id),
  onDeleted: (id) => chat.forget(id),
  onStored(id) {
    if (id !== chat.conversation.id || byId("chat").hidden) return;
    if (chat.busy) update();
    else reopen(id);
  },
});

const runs = new Runs();

// Updates everything around the messages that depends on the conversation.
function update() {
  const { conversation, busy } = chat;
  settings.show(conversation.settings);
  const title = byId("chat").hidden ? "Models" : conversation.title || "New chat";
  byId("title").textContent = title;
  document.title = conversation.title && title !== "Models" ? `${title} · nanoghost` : "nanoghost";
  byId("about-model").textContent = settings.describe(conversation.settings.model);
  byId("more").hidden = byId("chat").hidden || !conversation.title;
  const send = byId("send");
  send.setAttribute("aria-label", busy ? "Stop" : "Send");
  send.title = busy ? "Stop (Esc)" : "Send (Enter)";
  send.replaceChildren(icon(busy ? "stop" : "send"));
  send.disabled = !busy && !box.value.trim();
  box.placeholder = `Message ${conversation.settings.model || "the model"}`;
}

// ── views ──

async function route() {
  const [, view, name] = location.hash.split("/");
  const showsRuns = view === "runs";
  closeDrawer();
  byId("chat").hidden = showsRuns;
  byId("runs-view").hidden = !showsRuns;
  if (showsRuns) {
    byId("models").setAttribute("aria-current", "page");
    await runs.open(name && decodeURIComponent(name));
  } else {
    byId("models").removeAttribute("aria-current");
    runs.leave();
    await reopen(view === "c" ? name : null);
    if (!narrow.matches) box.focus();
  }
  update();
  sidebar.draw();
}

async function reopen(id) {
  if (!(await chat.open(id)) && id) history.replaceState(null, "", "#/");  // the conversation does not exist
}

async function start() {
  byId("server-problem").hidden = true;
  try {
    const [models, people, tools] = await Promise.all(["/v1/models", "/people", "/tools"].map(getJson));
    Object.assign(server, { models: models.data, people: people.data, tools: tools.data });
  } catch (error) {
    byId("server-problem").hidden = false;
    byId("server-error").textContent = error.message;
  }
  settings.fill();
  await route();
}

// ── the message box ──

function onInput() {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, innerHeight * 0.4)}px`;
  update();
}

function submit() {
  const text = box.value.trim();
  if (chat.busy) {
    chat.stop();
    return;
  }
  if (!text) return;
  box.value = "";
  chat.send(text);
  history.replaceState(null, "", `#/c/${chat.conversation.id}`);
  onInput();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
box.addEventListener("input", onInput);
box.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!chat.busy) submit();
  }
  if (event.key === "ArrowUp" && !box.value) {
    event.preventDefault();
    chat.editLast();
  }
});

// ── keyboard, drawer, theme, dialogs ──

function openDrawer() {
  document.body.classList.toggle("drawer", narrow.matches);
  document.body.classList.remove("sidebar-hidden");
  byId("main").inert = narrow.matches;
  byId("menu").setAttribute("aria-expanded", "true");
}

function closeDrawer() {
  document.body.classList.remove("drawer");
  byId("main").inert = false;
  if (narrow.matches) byId("menu").setAttribute("aria-expanded", "false");
}

byId("menu").addEventListener("click", () => {
  if (narrow.matches || document.body.classList.contains("sidebar-hidden")) {
    openDrawer();
    byId(narrow.matches ? "new-chat" : "menu").focus();
  } else {
    document.body.classList.add("sidebar-hidden");
    byId("menu").setAttribute("aria-expanded", "false");
  }
});
byId("backdrop").addEventListener("click", closeDrawer);

addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    openDrawer();
    byId("search").select();
    byId("search").focus();
  } else if (event.key === "?" && !typing) byId("keys-sheet").showModal();
  else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (document.body.classList.contains("drawer")) {
      closeDrawer();
      byId("menu").focus();
    } else if (byId("more").open) byId("more").open = false;
    else if (chat.busy) chat.stop();
  }
});

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("nanoghost-theme", root.dataset.theme);
});

byId("new-chat").addEventListener("click", () => {
  if (location.hash === "#/") route();
  else location.hash = "#/";
});
byId("help").addEventListener("click", () => byId("keys-sheet").showModal());
byId("server-retry").addEventListener("click", start);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();  // the fragment of the address selects the view
  (byId("chat").hidden ? byId("runs") : box).focus();
});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", ({ target }) => {
    const isOutside = target === dialog;  // its form fills it: the dialog itself is the target of clicks next to it
    if (isOutside && dialog.id !== "key-sheet") dialog.close();
  });
}
byId("more").addEventListener("click", ({ target }) => {
  const { id } = chat.conversation;
  const actions = {
    rename() {
      openDrawer();
      sidebar.rename(id);
    },
    markdown: () => sidebar.exportOne(id, true),
    json: () => sidebar.exportOne(id, false),
    delete: () => sidebar.delete(id),
  };
  const name = target.closest("[data-do]")?.dataset.do;
  if (!name) return;
  byId("more").open = false;
  actions[name]();
});

// The key is stored in the session of this tab and sent only to this server.
onKeyNeeded((rejected) => new Promise((resolve) => {
  const sheet = byId("key-sheet");
  byId("key-error").textContent = rejected ? "The server rejected the key." : "";
  byId("key").value = "";
  byId("key-form").onsubmit = (event) => {
    event.preventDefault();
    sheet.close();
    resolve(byId("key").value.trim());
  };
  if (!sheet.open) sheet.showModal();
}));
byId("key-sheet").addEventListener("cancel", (event) => event.preventDefault());

for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
addEventListener("hashchange", route);
start();
