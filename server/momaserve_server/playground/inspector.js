// The small table beside a token: which experts each layer used.

import { make } from "./dom.js";
import { colourOf } from "./marks.js";

const GAP_PX = 8;

/** Owns the one floating table of the page. `tokenOf` gives what an element shows. */
export class Inspector {
  #anchor = null;

  /** @param area where elements are looked at @param tokenOf element -> {token, numExperts} | null */
  constructor(area, tokenOf) {
    this.tokenOf = tokenOf;
    this.node = make("div", { class: "inspector", id: "inspector", role: "tooltip", hidden: true });
    document.body.append(this.node);
    area.addEventListener("pointerover", ({ target }) => this.#follow(target));
    area.addEventListener("focusin", ({ target }) => this.#follow(target));
    area.addEventListener("focusout", () => this.hide());
    area.addEventListener("pointerleave", () => this.#follow(document.activeElement));
    addEventListener("scroll", () => this.#place(), { passive: true, capture: true });
    addEventListener("resize", () => this.hide());
  }

  hide() {
    this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = null;
    this.node.hidden = true;
  }

  /** What is known of the element that is looked at changed. */
  refresh(element) {
    if (element === this.#anchor) this.#follow(element);
  }

  #follow(target) {
    const element = target.closest?.("[data-state]") ?? null;
    const found = element && this.tokenOf(element);
    if (!found) {
      if (this.#anchor !== document.activeElement) this.hide();
      return;
    }
    if (this.#anchor !== element) this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = element;
    if (!element.hasAttribute("aria-label")) element.setAttribute("aria-describedby", this.node.id);
    this.node.replaceChildren(headOf(found.token), bodyOf(found.token.routing, found.numExperts));
    this.node.hidden = false;
    this.#place();
  }

  #place() {
    const spot = [...(this.#anchor?.getClientRects() ?? [])].at(-1);
    if (!spot) return;
    const { width, height } = this.node.getBoundingClientRect();
    const [left, top] = this.#besideMap(spot, width) ?? nearSpot(spot, width, height);
    this.node.style.left = `${inside(left, width, innerWidth)}px`;
    this.node.style.top = `${inside(top, height, innerHeight)}px`;
  }

  /** Where the table hides no cell of the map; null where there is no such place. */
  #besideMap(spot, width) {
    const map = this.#anchor.closest(".map")?.getBoundingClientRect();
    if (!map) return null;
    if (map.right + GAP_PX + width < innerWidth) return [map.right + GAP_PX, spot.top];
    return map.left > GAP_PX + width ? [map.left - GAP_PX - width, spot.top] : null;
  }
}

function nearSpot(spot, width, height) {
  const isAbove = spot.bottom + GAP_PX + height > innerHeight && spot.top > height + GAP_PX;
  const top = isAbove ? spot.top - height - GAP_PX : spot.bottom + GAP_PX;
  return [spot.left + spot.width / 2 - width / 2, top];
}

function inside(wanted, length, room) {
  return Math.max(GAP_PX, Math.min(wanted, room - length - GAP_PX));
}

function headOf(token) {
  const name = token.title ?? JSON.stringify(token.text || token.name);
  const facts = [`id ${token.id}`, token.routing && `${token.routing.group} experts`, token.place];
  return make(
    "p",
    { class: "inspector-head" },
    make("strong", {}, name),
    make("span", {}, facts.filter(Boolean).join(" · ")),
  );
}

function bodyOf(routing, numExperts) {
  if (routing === null) return make("p", {}, "not known yet");
  if (routing.experts === null) return make("p", {}, "not computed (end of the answer)");
  const numbers = Array.from({ length: numExperts }, (_, expert) => expert);
  const head = numbers.map((expert) => make("th", { scope: "col" }, String(expert)));
  const rows = routing.experts.map((experts, layer) =>
    make("tr", {}, make("th", { scope: "row" }, String(layer)), ...columnsOf(experts, numbers)),
  );
  return make(
    "table",
    {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), ...head)),
    make("tbody", {}, ...rows),
  );
}

function columnsOf(experts, numbers) {
  if (experts === null || experts.length === 0) {
    const words = experts === null ? "passed by (depth routing)" : "no expert";
    return [make("td", { colspan: numbers.length, class: "no-expert" }, words)];
  }
  return numbers.map((expert) => {
    if (!experts.includes(expert)) return make("td", {}, "·");
    const chip = make("span", { class: "chip" }, String(expert));
    chip.style.setProperty("--chip", colourOf(expert));
    return make("td", { class: "used" }, chip);
  });
}
