// Calls to the server that the page came from, whatever path it is shown under.

const BASE = new URL(".", document.baseURI);

/** An answer that is none. `code` and `param` are the server's, if it gave them. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfterS = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfterS = retryAfterS;
  }
}

export class Api {
  /** @param keyring gives the key, and asks the user for another one */
  constructor(keyring) {
    this.keyring = keyring;
  }

  /**
   * The response to a call that went well.
   * @param body JSON text, which makes it a POST
   * @param mayAsk whether a missing key is worth a dialog; throws an ApiError otherwise
   */
  async request(path, { body, signal, mayAsk = true } = {}) {
    for (;;) {
      const key = this.keyring.value;
      const headers = {};
      if (key !== null) headers.Authorization = `Bearer ${key}`;
      if (body !== undefined) headers["Content-Type"] = "application/json";
      const method = body === undefined ? "GET" : "POST";
      const response = await this.#fetch(path, { method, headers, body, signal });
      if (response.ok) return response;
      const error = await errorOf(response);
      const isSolved = error.status === 401 && mayAsk && (await this.keyring.ask(key));
      if (!isSolved) throw error;
    }
  }

  async json(path, options) {
    return (await this.request(path, options)).json();
  }

  async #fetch(path, options) {
    try {
      return await fetch(new URL(path, BASE), { cache: "no-store", ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.", { code: "unreachable" });
    }
  }
}

/** The error inside an event of a stream. */
export function errorOfEvent({ message, code, param }) {
  return new ApiError(message, { code, param });
}

async function errorOf(response) {
  const wait = Number(response.headers.get("Retry-After") ?? NaN);
  const facts = { status: response.status, retryAfterS: Number.isFinite(wait) ? wait : null };
  const text = await response.text();
  try {
    const { message, code, param } = JSON.parse(text).error;
    return new ApiError(message, { ...facts, code, param });
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`.trim(), facts);
  }
}
