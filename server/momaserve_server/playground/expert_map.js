// The experts of a picture's codes: a grid over the picture, one cell per code.

import { make } from "./dom.js";
import { wordsOf } from "./marks.js";

const MOVES = {
  ArrowLeft: (at) => at - 1,
  ArrowRight: (at) => at + 1,
  ArrowUp: (at, columns) => at - columns,
  ArrowDown: (at, columns) => at + columns,
  Home: (at, columns) => at - (at % columns),
  End: (at, columns) => at - (at % columns) + columns - 1,
};

/** One tab stop; arrow keys go from cell to cell. */
export class ExpertMap {
  #cells;
  #columns;
  #firstId;
  #current = 0;

  /** @param image `image` of the model @param routing the page's RoutingView */
  constructor(image, routing) {
    const [rows, columns] = image.grid;
    this.#columns = columns;
    this.#firstId = image.first_token_id;
    this.routing = routing;
    this.ground = make("img", { class: "pixels", alt: "" });
    this.#cells = Array.from({ length: rows * columns }, (_, at) =>
      make("div", { class: "cell", role: "gridcell", tabindex: at === 0 ? 0 : -1 }),
    );
    const lines = Array.from({ length: rows }, (_, row) =>
      make("div", { role: "row" }, ...this.#cells.slice(row * columns, (row + 1) * columns)),
    );
    const grid = make("div", { class: "cells", role: "grid", "aria-label": LABEL }, ...lines);
    grid.style.setProperty("--columns", columns);
    grid.addEventListener("keydown", (event) => this.#onKey(event));
    grid.addEventListener("focusin", ({ target }) => this.#select(this.#cells.indexOf(target)));
    this.node = make("div", { class: "frame map" }, this.ground, grid);
    for (const [at, cell] of this.#cells.entries()) {
      cell.setAttribute("aria-label", `${placeOf(at, columns)}, not made yet`);
    }
  }

  /** A code was made, or its experts became known. */
  take(token) {
    const cell = this.#cells[token.cell];
    const place = placeOf(token.cell, this.#columns);
    const code = token.id - this.#firstId;
    token.title = `code ${code}`;
    token.place = place;
    cell.setAttribute("aria-label", `${place}, code ${code}: ${wordsOf(token.routing)}`);
    this.routing.show(cell, token);
  }

  #select(at) {
    this.#cells[this.#current].tabIndex = -1;
    this.#current = at;
    this.#cells[at].tabIndex = 0;
  }

  #onKey(event) {
    const move = MOVES[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const to = move(this.#current, this.#columns);
    const isAside = event.key === "ArrowLeft" || event.key === "ArrowRight";
    const isSameRow = Math.floor(to / this.#columns) === Math.floor(this.#current / this.#columns);
    if (this.#cells[to] && (!isAside || isSameRow)) this.#cells[to].focus();
  }
}

const LABEL = "Experts of the picture’s codes. Arrow keys move between codes.";

function placeOf(at, columns) {
  return `row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}`;
}
