// One picture of an answer: it grows row by row, and can be kept when it is whole.

import { icon, make } from "./dom.js";
import { ExpertMap } from "./expert_map.js";

const SIDE_PX = 360;
const MARGIN_PX = 32;

/** Owns a figure. States: growing, whole, cut. */
export class Picture {
  #image;
  #numCodes;
  #numDone = 0;
  #wish;

  /**
   * @param image `image` of the model
   * @param wish words of the question, for the description and the file's name
   * @param routing the RoutingView if experts are to be shown, else null
   */
  constructor(image, wish, routing) {
    this.#image = image;
    this.#numCodes = image.tokens_per_image;
    this.#wish = wish;
    this.url = null;
    const [rows, columns] = image.grid;
    this.pixels = make("img", { class: "pixels", alt: "Picture, still growing", hidden: true });
    this.cursor = make("span", { class: "cursor" });
    this.frame = make("div", { class: "frame canvas" }, this.pixels, this.cursor);
    this.map = routing && new ExpertMap(image, routing);
    const frames = make("div", { class: "frames" }, this.frame, ...(this.map ? [this.map.node] : []));
    this.progress = make("progress", { max: this.#numCodes, value: 0, "aria-label": "Codes drawn" });
    this.caption = make("span", { class: "caption-words" });
    /** Room for the tokens that begin and end the picture. */
    this.marks = make("span", { class: "marks" });
    const caption = make("figcaption", {}, this.progress, this.caption, this.marks);
    this.node = make("figure", { class: "picture", "data-is": "growing" }, frames, caption);
    const [height, width] = image.size;
    const room = Math.min(SIDE_PX, document.documentElement.clientWidth - MARGIN_PX);
    const scale = Math.max(1, Math.floor(room / Math.max(height, width))); // whole, to be crisp
    this.node.style.setProperty("--side", `${scale * width}px`);
    this.node.style.setProperty("--ratio", `${width} / ${height}`);
    this.node.style.setProperty("--columns", columns);
    this.node.style.setProperty("--rows", rows);
    this.#tell();
  }

  get isWhole() {
    return this.node.dataset.is === "whole";
  }

  /** A code was made, or its experts became known. */
  take(token) {
    this.map?.take(token);
    this.#advance(token.cell + 1);
  }

  /** A state of the picture that the server has rendered: `delta.image` of a chunk. */
  show({ tokens_done: done, tokens_total: total, b64_json: png }) {
    this.url = `data:image/png;base64,${png}`;
    this.pixels.src = this.url;
    this.pixels.hidden = false;
    if (this.map) this.map.ground.src = this.url;
    const [rows, columns] = this.#image.grid;
    this.node.style.setProperty("--drawn", Math.floor(done / columns) / rows);
    this.#advance(done);
    if (done === total) this.#finish();
  }

  /** The answer ended before the picture was whole. */
  cut() {
    this.node.dataset.is = "cut";
    this.pixels.alt = "Unfinished picture";
    this.#tell();
  }

  #advance(numDone) {
    if (numDone <= this.#numDone) return;
    this.#numDone = numDone;
    this.progress.value = numDone;
    const columns = this.#image.grid[1];
    this.node.style.setProperty("--at-row", Math.floor(numDone / columns));
    this.node.style.setProperty("--at-column", numDone % columns);
    if (!this.isWhole) this.#tell();
  }

  #finish() {
    this.node.dataset.is = "whole";
    this.pixels.alt = `Picture: ${this.#wish || "answer"}`;
    this.#tell();
    const name = this.#wish.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
    const file = `${name.replace(/^-|-$/g, "") || "picture"}.png`;
    const link = make(
      "a",
      { class: "action", href: this.url, download: file, title: `Save as ${file}` },
      icon("download"),
      make("span", {}, "Download PNG"),
    );
    this.caption.after(link);
  }

  #tell() {
    const [height, width] = this.#image.size;
    const [rows, columns] = this.#image.grid;
    const row = Math.min(rows, Math.floor(this.#numDone / columns) + 1);
    this.caption.textContent = {
      growing: `Row ${row} of ${rows}`,
      whole: `${width} × ${height} pixels, ${columns} × ${rows} codes`,
      cut: `Ended at code ${this.#numDone} of ${this.#numCodes}`,
    }[this.node.dataset.is];
  }
}
