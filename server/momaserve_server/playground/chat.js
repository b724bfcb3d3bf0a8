// The conversation: asks, shows what comes, stops, asks again.

import { Answer } from "./answer.js";
import { errorOfEvent } from "./api.js";
import { copyText } from "./clipboard.js";
import { Turn, messagesFor } from "./conversation.js";
import { byId, make, plural } from "./dom.js";
import { alertOf } from "./problem.js";
import { eventData } from "./sse.js";

const MODALITIES = { text: ["text"], image: ["image"], both: ["text", "image"] };
const MAX_PARTIAL_IMAGES = 64;
const NEAR_PX = 120;

/** Owns the turns, the articles of the page and the request under way. */
export class Chat {
  #turns = []; // {turn, answer, nodes}
  #running = null; // AbortController
  #isFollowing = true; // whether the reader is at the end
  #model = { image: null, limits: { images_per_request: Infinity } };

  /** @param parts {api, settings, gauges, routing, panel, tell, onBusy} */
  constructor(parts) {
    Object.assign(this, parts);
    this.scroller = byId("chat");
    this.scroller.addEventListener("scroll", () => {
      const { scrollHeight, clientHeight, scrollTop } = this.scroller;
      this.#isFollowing = scrollHeight - clientHeight - scrollTop < NEAR_PX;
    });
    this.list = byId("turns");
    this.welcome = byId("welcome");
  }

  describe(model) {
    this.#model = { ...model, image: model.image?.size ? model.image : null };
  }

  get isRunning() {
    return this.#running !== null;
  }

  /** Asks a question. @param pictures [{name, url}] */
  ask(text, pictures) {
    return this.#run(new Turn({ text, pictures, mode: this.settings.mode }));
  }

  /** Closes the connection, which ends the request on the server too. */
  stop() {
    this.#running?.abort();
  }

  startNew() {
    this.stop();
    this.#turns = [];
    this.routing.forget(this.list);
    this.list.replaceChildren();
    this.welcome.hidden = false;
    this.tell("A new conversation.");
  }

  /** Asks the last question anew. */
  #regenerate() {
    if (this.isRunning) return;
    const last = this.#turns.at(-1);
    const wrong = this.settings.check();
    if (wrong) this.#showField(wrong);
    else this.#run(new Turn(last.turn), last);
  }

  /** @param old the entry that this one takes the place of */
  async #run(turn, old = null) {
    const answer = new Answer({
      turn,
      image: this.#model.image,
      routing: this.routing.isOn ? this.routing : null,
      actions: { copy: () => this.#copy(answer), regenerate: () => this.#regenerate() },
    });
    if (old) this.#remove(old);
    const earlier = this.settings.sendsHistory ? this.#turns.map((entry) => entry.turn) : [];
    const { messages, numLeftOut } = messagesFor(turn, earlier, {
      system: this.settings.system.value,
      maxPictures: this.#model.limits.images_per_request,
    });
    this.#show(turn, answer, numLeftOut);
    const running = new AbortController();
    this.#running = running;
    this.onBusy(true);
    this.gauges.begin(answer.pace);
    try {
      await this.#stream(this.#bodyOf(turn, messages), answer, running.signal);
      answer.finish();
      this.#say(answer);
    } catch (error) {
      if (error.name === "AbortError") {
        answer.finish("stopped");
        this.tell("Stopped.");
      } else {
        this.#fail(answer, error);
      }
    } finally {
      turn.answer = answer.parts;
      answer.again.hidden = answer.node.querySelector(".problem") !== null;
      this.gauges.end();
      if (this.#running === running) {
        this.#running = null;
        this.onBusy(false);
      }
      this.#follow();
    }
  }

  async #stream(body, answer, signal) {
    const response = await this.api.request("v1/chat/completions", { body, signal });
    for await (const data of eventData(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOfEvent(chunk.error);
      answer.take(chunk);
      this.gauges.paceChanged();
      this.#follow();
    }
  }

  #bodyOf(turn, messages) {
    const body = {
      messages,
      modalities: MODALITIES[turn.mode],
      return_token_ids: true,
      stream: true,
      stream_options: { include_usage: true },
    };
    if (turn.mode !== "text" && this.#model.image) {
      const rows = this.#model.image.grid[0];
      body.partial_images = Math.min(rows - 1, MAX_PARTIAL_IMAGES); // the last row makes it whole
    }
    if (this.routing.isOn) Object.assign(body, { include_routing: true, logprobs: true });
    const given = Object.entries(this.settings.given());
    const fields = given.map(([name, json]) => `,${JSON.stringify(name)}:${json}`);
    return `${JSON.stringify(body).slice(0, -1)}${fields.join("")}}`;
  }

  #fail(answer, error) {
    const showField = this.settings.has(error.param) ? () => this.#showField(error.param) : null;
    if (showField) this.settings.mark(error.param, error.message);
    const actions = {
      again: () => this.#regenerate(),
      startNew: () => this.startNew(),
      showField,
    };
    answer.fail(alertOf(error, actions));
  }

  #showField(name) {
    this.panel.open();
    this.settings.focus(name);
  }

  #show(turn, answer, numLeftOut) {
    this.welcome.hidden = true;
    for (const past of this.#turns) past.answer.again.hidden = true;
    const nodes = [questionOf(turn), answer.node];
    if (numLeftOut > 0) {
      const words = `The oldest ${plural(numLeftOut, "turn")} did not go with this question: `;
      const why = `a request may have ${this.#model.limits.images_per_request} pictures.`;
      nodes.splice(1, 0, make("p", { class: "left-out" }, words + why));
    }
    this.#turns.push({ turn, answer, nodes });
    this.list.append(...nodes);
    this.#follow(true);
  }

  #remove(entry) {
    this.#turns.splice(this.#turns.indexOf(entry), 1);
    for (const node of entry.nodes) {
      this.routing.forget(node);
      node.remove();
    }
  }

  /** Keeps the end in view, unless the reader has gone elsewhere. */
  #follow(isForced = false) {
    if (isForced) this.#isFollowing = true;
    if (this.#isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #say(answer) {
    const pictures = answer.parts.filter(({ type }) => type === "image_url").length;
    const made = pictures ? `${plural(pictures, "picture")} ready. ` : "";
    this.tell(`${made}${answer.text}`.trim() || "An empty answer.");
  }

  async #copy(answer) {
    const isDone = await copyText(answer.text);
    if (isDone) answer.showCopied();
    this.tell(isDone ? "Copied." : "The browser did not let it be copied.", !isDone);
  }
}

function questionOf({ text, pictures }) {
  const thumbnails = pictures.map(({ name, url }) => make("img", { src: url, alt: name, title: name }));
  return make(
    "article",
    { class: "question", "aria-label": "Question" },
    ...(thumbnails.length ? [make("div", { class: "thumbnails" }, ...thumbnails)] : []),
    ...(text ? [make("p", {}, text)] : []),
  );
}
