// Talking to the server: JSON, events as they come, and errors in words.

const KEY = "nanoghost-key";

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Who asks for the key is set by the page; several requests that are refused at once wait for one answer.
let ask = null;
let asking = null;
export const onKeyNeeded = (question) => (ask = question);

async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "The server does not answer. Is nanoghost serve still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (sessionStorage.getItem(KEY) === key) {  // otherwise another request was given one meanwhile
      asking ??= ask(key !== null).finally(() => (asking = null));
      sessionStorage.setItem(KEY, await asking);
    }
  }
}

async function refusal(response) {
  const { error = {} } = await response.json().catch(() => ({}));
  if (response.status !== 429) return explained(response.status, error);
  const wait = response.headers.get("Retry-After");
  return new ServerError(429, `The server has too much to do just now${wait ? `; it asks to wait ${wait} s` : ""}.`);
}

const RESTARTING = "The engine is restarting. Your conversation is safe here; try again in a moment.";

function explained(status, { code, message }) {
  if (code === "engine_stopped" || (status === 503 && code !== "stopping")) return new ServerError(503, RESTARTING);
  const said = message || `the server answered ${status}`;
  return new ServerError(status, `${said[0].toUpperCase()}${said.slice(1)}${/[.!?]$/.test(said) ? "" : "."}`);
}

export const getJson = async (path) => (await request(path)).json();
export const getText = async (path) => (await request(path)).text();

// The data of server-sent events. Comments (pings) and other fields are passed over.
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

// Chunks of one answer. Throws ServerError where the server says so, or breaks off.
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
      if (chunk.error) throw explained(500, chunk.error);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError(0, "The connection broke; what was said until then is kept.");
  }
  throw new ServerError(0, "The answer broke off; what was said until then is kept.");
}

// What goes to the server for one answer: only what the API knows, only what was set.
export function chatBody(settings, messages, knowsTools) {
  const body = { model: settings.model, messages, stream: true, timings: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (Number.isFinite(settings[name])) body[name] = settings[name];
  }
  if (settings.person) body.person = settings.person;
  if (knowsTools && settings.tools.length) body.server_tools = settings.tools;
  return body;
}
