// One answer on the page: its text, its pictures, what was said of it, what can be done with it.

import { button, icon, make, plural } from "./dom.js";
import { Pace } from "./pace.js";
import { Picture } from "./picture.js";
import { TokenStream } from "./tokens.js";

const COPIED_MS = 1500;
const REASONS = {
  timeout: "cut at the time limit",
  length: "cut at the length limit",
  stopped: "stopped",
};

/** Owns an article. Takes the chunks of a stream until it is finished or fails. */
export class Answer {
  #tokens;
  #image;
  #wish;
  #routing;
  #pictures = [];
  #words = null; // the run of text that grows
  #elements = new Map(); // token of text -> its element
  #current = null; // the token that Tab leads to
  #parts = []; // of the reply, in order; a picture stands for its url

  /**
   * @param turn the question
   * @param image `image` of the model, or null
   * @param routing the RoutingView if experts are to be shown, else null
   * @param actions {copy, regenerate}
   */
  constructor({ turn, image, routing, actions }) {
    this.#tokens = new TokenStream(image);
    this.#image = image;
    this.#wish = turn.text;
    this.#routing = routing;
    this.pace = new Pace();
    this.reason = null;
    this.body = make("div", { class: "answer-body" });
    this.facts = make("p", { class: "facts" });
    this.copy = button({ icon: "copy", label: "Copy text", class: "action", onClick: actions.copy });
    this.again = button({
      icon: "redo",
      label: "Regenerate",
      class: "action",
      onClick: actions.regenerate,
    });
    this.copy.hidden = true;
    this.again.hidden = true;
    this.foot = make("footer", {}, this.facts, this.copy, this.again);
    this.node = make(
      "article",
      { class: "answer", "aria-label": "Answer", "aria-busy": "true" },
      this.body,
      this.foot,
    );
    if (routing) {
      this.body.addEventListener("keydown", (event) => this.#onKey(event));
      this.body.addEventListener("focusin", ({ target }) => this.#select(target));
    }
  }

  get text() {
    return this.#parts.map((part) => (typeof part === "string" ? part : "")).join("");
  }

  /** What the model is told of this answer later: its text and its whole pictures. */
  get parts() {
    const told = [];
    for (const part of this.#parts) {
      if (typeof part === "string") told.push({ type: "text", text: part });
      else if (part.isWhole) told.push({ type: "image_url", image_url: { url: part.url } });
    }
    return told;
  }

  /** A chunk of the stream. */
  take(chunk) {
    this.pace.usage = chunk.usage ?? this.pace.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { added, routed } = this.#tokens.push(choice);
    if (choice.delta.content) this.#addText(choice.delta.content);
    for (const token of added) this.#place(token);
    if (choice.delta.image) this.#pictures[choice.delta.image.index]?.show(choice.delta.image);
    for (const token of routed) this.#route(token);
    if (added.length) this.pace.count(added.length);
    if (choice.finish_reason) this.reason = choice.finish_reason;
    this.#showFacts();
  }

  showCopied() {
    this.copy.replaceChildren(icon("check"));
    setTimeout(() => this.copy.replaceChildren(icon("copy")), COPIED_MS);
  }

  finish(reason = this.reason) {
    this.reason = reason;
    for (const picture of this.#pictures) if (!picture.isWhole) picture.cut();
    if (this.#parts.length === 0 && reason !== "stopped") {
      this.body.append(make("p", { class: "nothing" }, "(an empty answer)"));
    }
    this.#end();
    this.#showFacts();
  }

  /** Shows what went wrong below what there is so far. */
  fail(problem) {
    for (const picture of this.#pictures) if (!picture.isWhole) picture.cut();
    this.body.after(problem);
    this.#end();
    if (this.pace.numTokens > 0) this.#showFacts();
  }

  #end() {
    this.node.setAttribute("aria-busy", "false");
    this.copy.hidden = this.text === "";
  }

  #addText(text) {
    if (typeof this.#parts.at(-1) === "string") this.#parts.push(this.#parts.pop() + text);
    else this.#parts.push(text);
    if (!this.#routing) this.#run().append(text);
  }

  #run() {
    if (!this.#words) {
      this.#words = make("div", { class: "words" });
      this.body.append(this.#words);
    }
    return this.#words;
  }

  #place(token) {
    if (token.kind === "begin") {
      const picture = new Picture(this.#image, this.#wish, this.#routing);
      this.#pictures.push(picture);
      this.#parts.push(picture);
      if (this.#routing) this.#addElement(token, picture.marks);
      this.body.append(picture.node);
      this.#words = null; // text after a picture starts below it
    } else if (token.kind === "code") {
      this.#pictures[token.picture].take(token);
    } else if (this.#routing) {
      const isEnd = token.kind === "end";
      this.#addElement(token, isEnd ? this.#pictures[token.picture].marks : this.#run());
    }
  }

  #addElement(token, place) {
    const space = /^\s+(?=\S)/.exec(token.text)?.[0] ?? ""; // lines may break behind it
    const words = token.text.slice(space.length);
    const element = make("span", { class: "token", tabindex: this.#current ? -1 : 0 }, words);
    if (token.kind !== "text") {
      element.classList.add("special");
      element.dataset.name = token.name.replace(/^<\|(.+)\|>$/, "$1");
    } else if (token.text === "") {
      element.classList.add("fragment");
    } else if (token.text.trim() === "" && token.text.includes("\n")) {
      element.classList.add("newline");
    }
    this.#current ??= element;
    this.#elements.set(token, element);
    place.append(space, element);
    this.#routing.show(element, token);
  }

  #route(token) {
    if (token.kind === "code") this.#pictures[token.picture].take(token);
    else if (this.#elements.has(token)) this.#routing?.show(this.#elements.get(token), token);
  }

  #select(element) {
    if (!element.classList.contains("token")) return;
    this.#current.tabIndex = -1;
    this.#current = element;
    element.tabIndex = 0;
  }

  #onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !event.target.classList.contains("token")) return;
    event.preventDefault();
    const elements = [...this.#elements.values()];
    elements[elements.indexOf(event.target) + step]?.focus();
  }

  #showFacts() {
    const { numTokens, tokensPerSecond, firstMs, numCached } = this.pace;
    const facts = [plural(numTokens, "token")];
    if (tokensPerSecond !== null) facts.push(`${tokensPerSecond.toFixed(0)} tokens/s`);
    if (firstMs !== null) facts.push(`first after ${firstMs.toFixed(0)} ms`);
    if (numCached > 0) facts.push(`${plural(numCached, "prompt token")} cached`);
    if (REASONS[this.reason]) facts.push(REASONS[this.reason]);
    this.facts.textContent = facts.join(" · ");
  }
}
