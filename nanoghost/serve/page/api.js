// Requests to the server: JSON, server-sent events, and errors with a message for the user.

const KEY = "nanoghost-key";

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The page sets the function that asks the user for the API key. Requests that are rejected at the same time share one
// prompt.
let promptForKey = null;
let pendingPrompt = null;
export const onKeyNeeded = (prompt) => (promptForKey = prompt);

async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "The server does not respond. Is nanoghost serve running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    if (sessionStorage.getItem(KEY) === key) {  // otherwise another request got a new key meanwhile
      pendingPrompt ??= promptForKey(key !== null).finally(() => (pendingPrompt = null));
      sessionStorage.setItem(KEY, await pendingPrompt);
    }
  }
}

async function errorOf(response) {
  const { error = {} } = await response.json().catch(() => ({}));
  if (response.status !== 429) return serverError(response.status, error);
  const seconds = response.headers.get("Retry-After");
  return new ServerError(429, `The server is at capacity. Try again ${seconds ? `in ${seconds} s` : "later"}.`);
}

const RESTARTING = "The engine is restarting. Your conversation is saved; try again in a moment.";

function serverError(status, { code, message }) {
  if (code === "engine_stopped" || (status === 503 && code !== "stopping")) return new ServerError(503, RESTARTING);
  const text = message || `the server responded with status ${status}`;
  const end = /[.!?]$/.test(text) ? "" : ".";
  return new ServerError(status, `${text[0].toUpperCase()}${text.slice(1)}${end}`);
}

export const getJson = async (path) => (await request(path)).json();
export const getText = async (path) => (await request(path)).text();

// The data of server-sent events. Comments (pings) and other fields are ignored.
export async function* sentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The chunks of one reply. Throws ServerError if the server reports an error or the stream ends early.
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of sentEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw serverError(500, chunk.error);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError(0, "The connection was lost. The reply so far is kept.");
  }
  throw new ServerError(0, "The reply ended early. Its text so far is kept.");
}

// The body of a chat request: only fields that the API accepts, and only settings that have a value.
export function chatBody(settings, messages, tools) {
  const body = { model: settings.model, messages, stream: true, timings: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (Number.isFinite(settings[name])) body[name] = settings[name];
  }
  if (settings.person) body.person = settings.person;
  if (tools) body.server_tools = tools;
  return body;
}
