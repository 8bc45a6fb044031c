// Conversations live in this browser (IndexedDB), and leave it only as files that somebody asks for.
//
//   conversation: {id, title, created, updated, settings, tree}      times are milliseconds

import { emptyTree, newId, path, ROOT, textOf } from "./tree.js";

export const DEFAULTS = { model: "", person: "", system: "", temperature: 0.7, top_p: 0.95, max_tokens: 512, tools: [] };

export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...DEFAULTS, ...settings }, tree: emptyTree() };
}

const wait = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let opened = null;
function database() {
  if (!opened) {
    const request = indexedDB.open("nanoghost", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    opened = wait(request);
  }
  return opened;
}

async function table(mode) {
  return (await database()).transaction("conversations", mode).objectStore("conversations");
}

const removed = new Set();  // an answer that still comes does not bring its conversation back

export const load = async (id) => wait((await table("readonly")).get(id));

export async function save(conversation) {
  if (!removed.has(conversation.id)) await wait((await table("readwrite")).put(conversation));
}

export async function remove(id) {
  removed.add(id);
  await wait((await table("readwrite")).delete(id));
}

export async function restore(conversation) {
  removed.delete(conversation.id);
  await save(conversation);
}

// All of them, the one used last first.
export async function loadAll() {
  const all = await wait((await table("readonly")).getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

// ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

export function toJson(conversations) {
  return JSON.stringify({ format: "nanoghost-conversations", version: 1, conversations }, null, 1);
}

// What is shown of a conversation; other branches are in the JSON only.
export function toMarkdown(conversation) {
  const turns = path(conversation.tree).map((node) => {
    const who = node.role === "user" ? "You" : node.model;
    return `**${who}**\n\n${textOf(node)}`;
  });
  return `# ${conversation.title}\n\n${turns.join("\n\n---\n\n")}\n`;
}

// The conversations of an exported file. A file comes from anywhere: only what has the right shape is taken, field by field.
export function fromJson(text) {
  let read;
  try {
    read = JSON.parse(text);
  } catch {
    throw new Error("That file is not JSON.");
  }
  if (read?.format !== "nanoghost-conversations" || !Array.isArray(read.conversations)) {
    throw new Error("That file holds no conversations of nanoghost.");
  }
  return read.conversations.map(checked);
}

const words = (value) => (typeof value === "string" ? value : "");
const idOf = (value) => (/^[\w-]{1,64}$/.test(words(value)) ? value : "");
const figure = (value, otherwise) => (Number.isFinite(value) ? value : otherwise);

function checked(given) {
  const conversation = newConversation();
  const told = given?.settings ?? {};
  const settings = { ...DEFAULTS };
  for (const name of ["model", "person", "system"]) settings[name] = words(told[name]);
  for (const name of ["temperature", "top_p", "max_tokens"]) settings[name] = figure(told[name], DEFAULTS[name]);
  if (Array.isArray(told.tools)) settings.tools = told.tools.map(words).filter(Boolean);
  // A map without a prototype: a node may be called anything.
  const nodes = Object.create(null);
  for (const node of Object.values(given?.tree?.nodes ?? {})) {
    const parent = words(node?.parent);
    // Parents come before their children, so there is no circle.
    const isNew = idOf(node?.id) && node.id !== ROOT && !nodes[node.id];
    if (isNew && (parent === ROOT || nodes[parent])) nodes[node.id] = checkedNode(node, parent);
  }
  const chosen = {};
  for (const node of Object.values(nodes)) {
    const wanted = given.tree.chosen?.[node.parent];
    if (!(node.parent in chosen) || node.id === wanted) chosen[node.parent] = node.id;
  }
  return {
    id: idOf(given?.id) || conversation.id,
    title: words(given?.title) || "Without a title",
    created: figure(given?.created, conversation.created),
    updated: figure(given?.updated, conversation.updated),
    settings,
    tree: { nodes: { ...nodes }, chosen },
  };
}

function checkedNode(node, parent) {
  const { id } = node;
  if (node.role === "user") return { id, parent, role: "user", text: words(node.text) };
  const parts = (Array.isArray(node.parts) ? node.parts : []).map((part) => {
    if (!part?.call) return { text: words(part?.text) };
    const call = { passages: (Array.isArray(part.call.passages) ? part.call.passages : []).map(checkedPassage) };
    for (const name of ["id", "name", "arguments", "content"]) call[name] = words(part.call[name]);
    return { call };
  });
  const answer = { id, parent, role: "assistant", model: words(node.model), parts, finish: words(node.finish) };
  if (words(node.error)) answer.error = node.error;
  const timings = Object.entries(node.timings ?? {}).filter(([, value]) => Number.isFinite(value));
  if (timings.length) answer.timings = Object.fromEntries(timings);
  return answer;
}

const checkedPassage = (passage) => ({ n: figure(passage?.n, 0), source: words(passage?.source), text: words(passage?.text) });
