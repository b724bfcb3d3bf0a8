// The tokens of one answer as they stream in: what each one is, and which experts it used.
// Knows no element of the page.

const EMPTY = new Uint8Array();

/**
 * @typedef {object} Token
 * @property {number} id
 * @property {"text"|"special"|"begin"|"code"|"end"} kind
 * @property {string} name how the server spells it
 * @property {string} text what it adds to the answer; empty inside a character of several tokens
 * @property {number} picture number of the picture that it belongs to
 * @property {number} cell of a code: its place in the picture, in raster order
 * @property {object|null} routing `{group, experts}`; null while it is not known
 */

/** Joins token ids, their spelling and their routing, which lags behind. */
export class TokenStream {
  #image;
  #decoder = new TextDecoder();
  #numSpelled = 0;
  #numRouted = 0;
  #numPictures = 0;
  #numCodes = 0;

  /** @param image `image` of the model, or null */
  constructor(image) {
    this.#image = image;
    /** @type {Token[]} */
    this.all = [];
  }

  /**
   * Takes a chunk's choice.
   * @returns {{added: Token[], routed: Token[]}} new tokens, and those whose routing became known
   */
  push({ token_ids: ids = [], logprobs, routing = [] }) {
    const added = ids.map((id) => this.#token(id));
    this.all.push(...added);
    for (const entry of logprobs?.content ?? []) this.#spell(this.all[this.#numSpelled++], entry);
    const routed = routing.map(({ group, experts }) => {
      const token = this.all[this.#numRouted++];
      token.routing = { group, experts };
      return token;
    });
    return { added, routed };
  }

  #token(id) {
    const token = { id, kind: this.#kindOf(id), name: "", text: "", routing: null };
    token.picture = this.#numPictures;
    if (token.kind === "begin") this.#numCodes = 0;
    if (token.kind === "code") token.cell = this.#numCodes++;
    if (token.kind === "end") this.#numPictures += 1;
    return token;
  }

  #kindOf(id) {
    if (!this.#image) return "text";
    const { begin_token_id: begin, end_token_id: end, first_token_id: first } = this.#image;
    if (id === begin) return "begin";
    if (id === end) return "end";
    return id >= first && id < first + this.#image.num_codes ? "code" : "text";
  }

  #spell(token, { token: name, bytes }) {
    token.name = name;
    if (token.kind !== "text") {
      this.#decoder = new TextDecoder(); // no character goes on behind a picture
    } else if (bytes === null) {
      token.kind = "special";
    } else {
      token.text = this.#decoder.decode(new Uint8Array(bytes ?? EMPTY), { stream: true });
    }
  }
}
