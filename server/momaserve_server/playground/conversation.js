// What was said, and the messages that the server is told of it. Knows no element of the page.

/** One question and its answer. */
export class Turn {
  /** @param pictures [{name, url}] with `data:` URLs */
  constructor({ text, pictures, mode }) {
    this.text = text;
    this.pictures = pictures;
    this.mode = mode;
    /** Parts of the answer, in order; empty until there is something worth telling the model. */
    this.answer = [];
  }

  get numPictures() {
    return this.pictures.length + this.answer.filter(({ type }) => type === "image_url").length;
  }

  question() {
    const pictures = this.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const words = this.text ? [{ type: "text", text: this.text }] : [];
    return { role: "user", content: pictures.length ? [...pictures, ...words] : this.text };
  }

  reply() {
    const isText = this.answer.every(({ type }) => type === "text");
    const content = isText ? this.answer.map(({ text }) => text).join("") : this.answer;
    return { role: "assistant", content };
  }
}

/**
 * Messages that ask `turn` after `earlier` ones. Turns that got no answer are left out, and the
 * oldest ones as soon as a request would have more than `maxPictures`.
 * @returns {{messages: object[], numLeftOut: number}}
 */
export function messagesFor(turn, earlier, { system = "", maxPictures = Infinity } = {}) {
  const answered = earlier.filter(({ answer }) => answer.length > 0);
  const kept = [];
  let numPictures = turn.pictures.length;
  for (const past of answered.toReversed()) {
    numPictures += past.numPictures;
    if (numPictures > maxPictures) break;
    kept.unshift(past);
  }
  const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const past of kept) messages.push(past.question(), past.reply());
  messages.push(turn.question());
  return { messages, numLeftOut: answered.length - kept.length };
}
