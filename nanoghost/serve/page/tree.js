// A conversation is a tree: regenerating a reply or editing a message starts a new branch next to the old one. These
// functions do not modify their arguments and do not access the page.
//
//   {nodes: {id: node}, chosen: {id of a parent: id of the child that is shown}}
//   node: {id, parent, role: "user", text}  or  {id, parent, role: "assistant", model, parts, finish, error, timings}
//   part of a reply: {text}  or  {call: {id, name, arguments, content, passages}}

export const ROOT = "root";

export const emptyTree = () => ({ nodes: {}, chosen: {} });

export const newId = () => crypto.getRandomValues(new Uint32Array(3)).reduce((id, n) => id + n.toString(36), "n");

// The tree with one more node, which becomes the one that is shown.
export function add(tree, node) {
  return { nodes: { ...tree.nodes, [node.id]: node }, chosen: { ...tree.chosen, [node.parent]: node.id } };
}

export function change(tree, id, fields) {
  return { ...tree, nodes: { ...tree.nodes, [id]: { ...tree.nodes[id], ...fields } } };
}

// The tree without a node that has no children.
export function without(tree, id) {
  const { [id]: node, ...nodes } = tree.nodes;
  if (tree.chosen[node.parent] !== id) return { nodes, chosen: tree.chosen };
  const { [node.parent]: _, ...chosen } = tree.chosen;
  const lastSibling = children({ nodes }, node.parent).at(-1);
  if (lastSibling) chosen[node.parent] = lastSibling.id;
  return { nodes, chosen };
}

const children = (tree, parent) => Object.values(tree.nodes).filter((node) => node.parent === parent);

// The ids of a node and its alternatives, the oldest first.
export const siblings = (tree, id) => children(tree, tree.nodes[id].parent).map((node) => node.id);

// The tree that shows the sibling `offset` positions after this node; the first or last one if there are not so many.
export function showSibling(tree, id, offset) {
  const all = siblings(tree, id);
  const index = Math.min(Math.max(all.indexOf(id) + offset, 0), all.length - 1);
  return { ...tree, chosen: { ...tree.chosen, [tree.nodes[id].parent]: all[index] } };
}

// The nodes that are shown, from the first message on; only those before the node `until`.
export function path(tree, until) {
  const nodes = [];
  for (let id = tree.chosen[ROOT]; id && id !== until; id = tree.chosen[id]) nodes.push(tree.nodes[id]);
  return nodes;
}

// The nodes from the first message to this one, whether they are shown or not.
export function ancestry(tree, id) {
  const nodes = [];
  for (let current = id; current !== ROOT; current = tree.nodes[current].parent) nodes.unshift(tree.nodes[current]);
  return nodes;
}

export const textOf = (node) =>
  node.role === "user" ? node.text : node.parts.map((part) => part.text ?? "").filter(Boolean).join("\n\n");

// The messages of these nodes for OpenAI's API. A model that does not support tools gets only the texts.
export function messages(nodes, system, supportsTools) {
  const systemMessages = system ? [{ role: "system", content: system }] : [];
  const messagesOf = (node) => (node.role === "assistant" && supportsTools ? replyMessages(node) : textMessage(node));
  return systemMessages.concat(nodes.flatMap(messagesOf));
}

function textMessage(node) {
  const content = textOf(node);
  return content || node.role === "user" ? [{ role: node.role, content }] : [];
}

// A reply with its tool calls and their results.
function replyMessages(node) {
  const result = [];
  let text = "";
  for (const part of node.parts) {
    if (part.text !== undefined) text += part.text;
    else if (part.call.content !== undefined) {  // a call that was stopped before its result is omitted
      const { id, name, arguments: json, content } = part.call;
      const call = { id, type: "function", function: { name, arguments: json } };
      result.push({ role: "assistant", content: text, tool_calls: [call] });
      result.push({ role: "tool", tool_call_id: id, content });
      text = "";
    }
  }
  return text ? [...result, { role: "assistant", content: text }] : result;
}

// The title of a conversation is the beginning of its first message.
export function titleFrom(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  const characters = [...line];
  return characters.length <= 48 ? line : characters.slice(0, 48).join("").replace(/\s\S*$/, "") + "…";
}

// An excerpt with the text that was searched for, "" if only the title matches, null if nothing does. All branches are
// searched.
export function find(conversation, query) {
  const needle = query.toLowerCase();
  for (const node of Object.values(conversation.tree.nodes)) {
    const text = textOf(node).normalize("NFKC");
    const start = text.toLowerCase().indexOf(needle);
    if (start >= 0) return text.slice(Math.max(0, start - 24), start + needle.length + 48).replace(/\s+/g, " ");
  }
  return conversation.title.normalize("NFKC").toLowerCase().includes(needle) ? "" : null;
}
