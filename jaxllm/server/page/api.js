// How the page talks to the server: one function for a request, one for a stream of events.

const KEY_NAME = "jaxllm-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY_NAME) ?? "",
  set: (key) => sessionStorage.setItem(KEY_NAME, key),
};

/** What the server refused, with its own words. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** fetch with the API key; an answer that is no success is a ServerError. */
export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let message = `the server answered ${response.status}`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.reason ?? message;
  } catch {
    // not JSON: the status says enough
  }
  return new ServerError(message, response.status);
}

/** The JSON of each `data:` event of a response until [DONE]; an error event is thrown. */
export async function* events(response) {
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data:")) continue; // an empty line or a keep-alive comment
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, response.status);
    yield event;
  }
  throw new ServerError("the connection ended before the answer did", response.status);
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}
