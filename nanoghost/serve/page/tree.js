// A conversation is a tree: asking again, or asking otherwise, begins a branch beside the old one. Nothing here changes
// what it is given, and nothing knows the page.
//
//   {nodes: {id: node}, chosen: {id of a parent: id of the child that is shown}}
//   node: {id, parent, role: "user", text}  or  {id, parent, role: "assistant", model, parts, finish, error, timings}
//   part of an answer: {text}  or  {call: {id, name, arguments, content, passages}}

export const ROOT = "root";

export const emptyTree = () => ({ nodes: {}, chosen: {} });

export const newId = () => crypto.getRandomValues(new Uint32Array(3)).reduce((id, n) => id + n.toString(36), "n");

// With one more node, which is then the one shown.
export function add(tree, node) {
  return { nodes: { ...tree.nodes, [node.id]: node }, chosen: { ...tree.chosen, [node.parent]: node.id } };
}

export function change(tree, id, fields) {
  return { ...tree, nodes: { ...tree.nodes, [id]: { ...tree.nodes[id], ...fields } } };
}

// Without a node that nothing follows.
export function without(tree, id) {
  const { [id]: gone, ...nodes } = tree.nodes;
  const { [gone.parent]: shown, ...chosen } = tree.chosen;
  const left = children({ nodes }, gone.parent).at(-1)?.id;
  return { nodes, chosen: shown !== id ? tree.chosen : left ? { ...chosen, [gone.parent]: left } : chosen };
}

const children = (tree, parent) => Object.values(tree.nodes).filter((node) => node.parent === parent);

// Ids of a node and its alternatives, the oldest first.
export const siblings = (tree, id) => children(tree, tree.nodes[id].parent).map((node) => node.id);

// The tree with the sibling shown that stands `by` places further; at the ends it stays.
export function turn(tree, id, by) {
  const all = siblings(tree, id);
  const at = Math.min(Math.max(all.indexOf(id) + by, 0), all.length - 1);
  return { ...tree, chosen: { ...tree.chosen, [tree.nodes[id].parent]: all[at] } };
}

// The nodes that are shown, from the first message on. `until`: only what comes before this node.
export function path(tree, until) {
  const shown = [];
  for (let at = tree.chosen[ROOT]; at && at !== until; at = tree.chosen[at]) shown.push(tree.nodes[at]);
  return shown;
}

// From the first message to this node, whichever branches are shown.
export function ancestry(tree, id) {
  const line = [];
  for (let at = id; at !== ROOT; at = tree.nodes[at].parent) line.unshift(tree.nodes[at]);
  return line;
}

export const textOf = (node) =>
  node.role === "user" ? node.text : node.parts.map((part) => part.text ?? "").filter(Boolean).join("\n\n");

// What OpenAI's API calls messages. A model that knows no tools reads only the texts.
export function messages(line, system, knowsTools) {
  const told = system ? [{ role: "system", content: system }] : [];
  return told.concat(line.flatMap((node) => (node.role === "user" || !knowsTools ? plain(node) : withCalls(node))));
}

function plain(node) {
  const content = textOf(node);
  return content || node.role === "user" ? [{ role: node.role, content }] : [];
}

function withCalls(node) {
  const said = [];
  let text = "";
  for (const part of node.parts) {
    if (part.text !== undefined) text += part.text;
    else if (part.call.content !== undefined) {  // a call that was stopped before its result never happened
      const { id, name, arguments: given, content } = part.call;
      const call = { id, type: "function", function: { name, arguments: given } };
      said.push({ role: "assistant", content: text, tool_calls: [call] });
      said.push({ role: "tool", tool_call_id: id, content });
      text = "";
    }
  }
  return text ? [...said, { role: "assistant", content: text }] : said;
}

// A conversation is called by how it began.
export function titleFrom(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  const characters = [...line];
  return characters.length <= 48 ? line : characters.slice(0, 48).join("").replace(/\s\S*$/, "") + "…";
}

// Where a text is found: {title, excerpt} or null. Every branch is searched, not only the one shown.
export function find(conversation, query) {
  const wanted = query.toLowerCase();
  for (const node of Object.values(conversation.tree.nodes)) {
    const text = textOf(node);
    const at = text.toLowerCase().indexOf(wanted);
    if (at >= 0) return text.slice(Math.max(0, at - 24), at + wanted.length + 48).replace(/\s+/g, " ");
  }
  return conversation.title.toLowerCase().includes(wanted) ? "" : null;
}
