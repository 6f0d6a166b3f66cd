// Requests to the server. An error's message is the server's own sentence.

export class ServerError extends Error {}

const KEY = "flm-api-key";

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  if (key) options = { ...options, headers: { ...options.headers, Authorization: `Bearer ${key}` } };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running? Change anything to try again.");
  }
  if (response.status === 401) {
    const given = window.prompt("This server asks for an API key.");
    if (given) {
      sessionStorage.setItem(KEY, given.trim());
      return call(path, options);
    }
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  throw new ServerError(answer?.detail ?? `The server answered ${response.status} without a reason.`);
}

export const get = (path, parameters = {}, signal = undefined) =>
  call(`${path}?${new URLSearchParams(parameters)}`, { signal });

export const post = (path, body, signal = undefined) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

// The newest request of a kind: starting one gives up the one before, whose answer is then never seen.
export class Latest {
  #controller = new AbortController();

  next() {
    this.#controller.abort();
    this.#controller = new AbortController();
    return this.#controller.signal;
  }
}
