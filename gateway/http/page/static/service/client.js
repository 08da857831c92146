// The service: OpenAI's API on the server that this page came from.

import { BrokenStreamError, ServiceError, UnreachableError } from "./failures.js";

// In the memory of the page alone: a reload forgets it.
let apiKey = "";

export function setApiKey(key) {
  apiKey = key;
}

/** The served model, with its limits and the defaults of its sampling. */
export async function getModel() {
  const response = await request("v1/models");
  return (await response.json()).data[0];
}

/** The chunks of a chat completion; `body` is JSON. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServiceError(statusOf(chunk.error), chunk.error);
    yield chunk;
  }
  throw new BrokenStreamError();
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const response = await reached(fetch(path, { ...options, headers, cache: "no-store" }));
  if (response.ok) return response;
  let problem = null;
  try {
    problem = (await response.json()).error;
  } catch {
    // A proxy's error has no JSON.
  }
  const retryAfter = parseFloat(response.headers.get("Retry-After"));
  throw new ServiceError(
    response.status,
    problem,
    Number.isFinite(retryAfter) ? retryAfter : null,
    response.headers.get("x-request-id"),
  );
}

/** The response that comes; a browser's TypeError says that none did. */
async function reached(response) {
  try {
    return await response;
  } catch (error) {
    throw error instanceof TypeError ? new UnreachableError() : error;
  }
}

/** The data of each event of a stream; comments are left out. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ")) yield line.slice(6);
      }
    }
  } catch (error) {
    // As with requests: a browser's TypeError says that the connection broke.
    throw error instanceof TypeError ? new BrokenStreamError() : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The status that an error would have had before the stream began. */
function statusOf(problem) {
  if (problem.type === "rate_limit_error") return 429;
  return problem.type === "server_error" ? 500 : 400;
}
