// How fast one answer comes, as the reader of it sees it. Knows no element of the page.

export class Pace {
  #sentAt;
  #firstAt = null;
  #lastAt = null;
  #numFirst = 0;

  /** @param now milliseconds, as of `performance.now()` */
  constructor(now = performance.now()) {
    this.#sentAt = now;
    this.numTokens = 0;
    /** `usage` of the server, once it is told. */
    this.usage = null;
  }

  count(numTokens, now = performance.now()) {
    this.#firstAt ??= now;
    this.#lastAt = now;
    this.#numFirst ||= numTokens;
    this.numTokens += numTokens;
  }

  /** Milliseconds until the first token; null before it. */
  get firstMs() {
    return this.#firstAt === null ? null : this.#firstAt - this.#sentAt;
  }

  /** After the first one; null while there is none. */
  get tokensPerSecond() {
    const num = this.numTokens - this.#numFirst;
    const ms = this.#lastAt - this.#firstAt;
    return num > 0 && ms > 0 ? (1000 * num) / ms : null;
  }

  get numCached() {
    return this.usage?.prompt_tokens_details?.cached_tokens ?? 0;
  }
}
