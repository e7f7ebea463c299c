// The server, as any OpenAI client sees it.

/** What the server refused, in its own words. status: of HTTP; 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The names of the models; ApiError. */
export async function models(key) {
  const response = await request("v1/models", { headers: headers(key) });
  return (await response.json()).data.map((model) => model.id);
}

/** The chunks of an answer, as they come; ApiError, also when `signal` stops it. */
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(0, "");
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError(0, ""); // cut off, or not from a server that we know
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  const response = await fetch(path, options).catch(lost);
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const { message = `HTTP ${response.status}`, code } = body?.error ?? {};
  throw new ApiError(response.status, message, code);
}

/** The connection, or an answer that was stopped: whoever stopped it knows. */
function lost() {
  throw new ApiError(0, "");
}

/** The data of each server-sent event; comments are dropped. */
async function* events(stream) {
  const data = [];
  for await (const line of lines(stream)) {
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
    else if (line === "" && data.length) yield data.splice(0).join("\n");
  }
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(lost);
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const line of parts) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
