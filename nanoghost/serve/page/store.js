// Conversations are stored in this browser (IndexedDB). They leave it only as exported files.
//
//   conversation: {id, title, created, updated, settings, tree}      times are milliseconds

import { emptyTree, newId, path, ROOT, textOf } from "./tree.js";

export const DEFAULTS = { model: "", person: "", system: "", temperature: 0.7, top_p: 0.95, max_tokens: 512, tools: null };

export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...DEFAULTS, ...settings }, tree: emptyTree() };
}

const resultOf = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let openDatabase = null;
function database() {
  if (!openDatabase) {
    const request = indexedDB.open("nanoghost", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    openDatabase = resultOf(request);
  }
  return openDatabase;
}

async function objectStore(mode) {
  return (await database()).transaction("conversations", mode).objectStore("conversations");
}

const deletedIds = new Set();  // a reply that is still being generated must not save its conversation again

export const load = async (id) => resultOf((await objectStore("readonly")).get(id));

export async function save(conversation) {
  if (!deletedIds.has(conversation.id)) await resultOf((await objectStore("readwrite")).put(conversation));
}

export async function remove(id) {
  deletedIds.add(id);
  await resultOf((await objectStore("readwrite")).delete(id));
}

export async function restore(conversation) {
  deletedIds.delete(conversation.id);
  await save(conversation);
}

// All conversations, the most recently used first.
export async function loadAll() {
  const all = await resultOf((await objectStore("readonly")).getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

// ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

export function toJson(conversations) {
  return JSON.stringify({ format: "nanoghost-conversations", version: 1, conversations }, null, 1);
}

// The branch of a conversation that is shown; the other branches are only in the JSON.
export function toMarkdown(conversation) {
  const turns = path(conversation.tree).map((node) => {
    const author = node.role === "user" ? "You" : node.model;
    return `**${author}**\n\n${textOf(node)}`;
  });
  return `# ${conversation.title}\n\n${turns.join("\n\n---\n\n")}\n`;
}

// The conversations of an exported file. Files are untrusted: each field is copied only if it has the right type.
export function fromJson(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (content?.format !== "nanoghost-conversations" || !Array.isArray(content.conversations)) {
    throw new Error("The file contains no nanoghost conversations.");
  }
  return content.conversations.map(validConversation);
}

const validText = (value) => (typeof value === "string" ? value : "");
const validId = (value) => (/^[\w-]{1,64}$/.test(validText(value)) ? value : "");
const validNumber = (value, fallback) => (Number.isFinite(value) ? value : fallback);

function validConversation(input) {
  const conversation = newConversation();
  const inputSettings = input?.settings ?? {};
  const settings = { ...DEFAULTS };
  for (const name of ["model", "person", "system"]) settings[name] = validText(inputSettings[name]);
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    settings[name] = validNumber(inputSettings[name], DEFAULTS[name]);
  }
  if (Array.isArray(inputSettings.tools)) settings.tools = inputSettings.tools.map(validText).filter(Boolean);
  // An object without a prototype: the id of a node can be any word.
  const nodes = Object.create(null);
  for (const node of Object.values(input?.tree?.nodes ?? {})) {
    const parent = validText(node?.parent);
    // Parents must come before their children, so there are no cycles.
    const isNew = validId(node?.id) && node.id !== ROOT && !nodes[node.id];
    if (isNew && (parent === ROOT || nodes[parent])) nodes[node.id] = validNode(node, parent);
  }
  const chosen = {};
  for (const node of Object.values(nodes)) {
    const chosenId = input.tree.chosen?.[node.parent];
    if (!(node.parent in chosen) || node.id === chosenId) chosen[node.parent] = node.id;
  }
  return {
    id: validId(input?.id) || conversation.id,
    title: validText(input?.title) || "Untitled",
    created: validNumber(input?.created, conversation.created),
    updated: validNumber(input?.updated, conversation.updated),
    settings,
    tree: { nodes: { ...nodes }, chosen },
  };
}

function validNode(node, parent) {
  const { id } = node;
  if (node.role === "user") return { id, parent, role: "user", text: validText(node.text) };
  const parts = (Array.isArray(node.parts) ? node.parts : []).map((part) => {
    if (!part?.call) return { text: validText(part?.text) };
    const call = { passages: (Array.isArray(part.call.passages) ? part.call.passages : []).map(validPassage) };
    for (const name of ["id", "name", "arguments", "content"]) call[name] = validText(part.call[name]);
    return { call };
  });
  const reply = { id, parent, role: "assistant", model: validText(node.model), parts, finish: validText(node.finish) };
  if (validText(node.error)) reply.error = node.error;
  const timings = Object.entries(node.timings ?? {}).filter(([, value]) => Number.isFinite(value));
  if (timings.length) reply.timings = Object.fromEntries(timings);
  return reply;
}

const validPassage = (passage) => ({
  n: validNumber(passage?.n, 0),
  source: validText(passage?.source),
  text: validText(passage?.text),
});
