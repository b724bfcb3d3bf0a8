// The routing view: the switch, the choice of a layer, the legend, and how elements are painted.

import { byId, make } from "./dom.js";
import { Inspector } from "./inspector.js";
import { colourOf, labelIn, rowOf, splitOf, stateIn } from "./marks.js";

const tinted = (share) => (colour) => `color-mix(in srgb, ${colour} ${share}, transparent)`;
const FAINT = tinted("24%"); // behind words
const STRONG = tinted("82%"); // over a picture

/** Owns what is painted where; answers hand their tokens over. */
export class RoutingView {
  #shown = new Map(); // element -> token
  #numExperts = new Map(); // group -> experts
  #numLayers = 0;
  #layer = null; // null is all of them

  constructor(area) {
    this.toggle = byId("show-routing");
    this.bar = byId("routing-bar");
    this.layers = byId("layers");
    this.inspector = new Inspector(area, (element) => this.#find(element));
    this.toggle.addEventListener("change", () => this.#switch());
    this.layers.addEventListener("change", ({ target }) => {
      this.#layer = target.value === "all" ? null : Number(target.value);
      this.#paintAll();
    });
    this.#addLayer("all", "All layers");
    this.#switch();
  }

  get isOn() {
    return this.toggle.checked;
  }

  /** @param groups `expert_groups` of the model */
  describe(groups) {
    for (const { name, num_experts: num } of groups) this.#numExperts.set(name, num);
    const most = Math.max(0, ...this.#numExperts.values());
    const chips = Array.from({ length: most }, (_, expert) => {
      const chip = make("li", { class: "chip" }, String(expert));
      chip.style.setProperty("--chip", colourOf(expert));
      return chip;
    });
    byId("legend-experts").replaceChildren(...chips);
  }

  /** Paints a token's element, now and whenever the layer changes. */
  show(element, token) {
    this.#shown.set(element, token);
    this.#learn(token.routing?.experts?.length ?? 0);
    this.#paint(element, token);
    this.inspector.refresh(element);
  }

  /** Forgets all elements inside of `node`. */
  forget(node) {
    for (const element of this.#shown.keys()) {
      if (node.contains(element)) this.#shown.delete(element);
    }
    this.inspector.hide();
  }

  #find(element) {
    const token = this.#shown.get(element);
    if (!token || !this.isOn) return null;
    return { token, numExperts: this.#expertsOf(token) };
  }

  #expertsOf(token) {
    return this.#numExperts.get(token.routing?.group) ?? 1;
  }

  #switch() {
    document.documentElement.toggleAttribute("data-routing", this.isOn);
    this.bar.hidden = !this.isOn;
    this.inspector.hide();
  }

  #learn(numLayers) {
    if (numLayers <= this.#numLayers) return;
    document.documentElement.style.setProperty("--num-layers", numLayers);
    for (let layer = this.#numLayers; layer < numLayers; layer += 1) {
      this.#addLayer(String(layer), String(layer), `Layer ${layer}`);
    }
    this.#numLayers = numLayers;
  }

  #addLayer(value, words, label = null) {
    const id = `layer-${value}`;
    this.layers.append(
      make("input", {
        type: "radio",
        name: "layer",
        id,
        value,
        checked: value === "all",
        "aria-label": label,
      }),
      make("label", { for: id }, words),
    );
  }

  #paintAll() {
    document.documentElement.toggleAttribute("data-one-layer", this.#layer !== null);
    for (const [element, token] of this.#shown) this.#paint(element, token);
  }

  #paint(element, token) {
    const { routing } = token;
    const state = stateIn(routing, this.#layer);
    const mark = this.#layer === null ? "" : labelIn(routing, this.#layer);
    element.dataset.state = state;
    element.dataset.mark = mark;
    const style = element.style;
    if (state === "all") {
      const rows = routing.experts.map((experts) => rowOf(experts, this.#expertsOf(token)));
      style.backgroundImage = rows.join(", ");
      style.backgroundPosition = rows.map((_, at) => placeOf(element, at, rows.length)).join(", ");
    } else if (state === "one" || state === "several") {
      const experts = routing.experts[this.#layer];
      style.backgroundImage = isCell(element)
        ? splitOf(experts, STRONG)
        : `${splitOf(experts)}, ${splitOf(experts, FAINT)}`;
      style.backgroundPosition = "";
    } else {
      style.backgroundImage = "";
      style.backgroundPosition = "";
    }
  }
}

function isCell(element) {
  return element.classList.contains("cell");
}

/** Rows fill a cell, and stand under a token of text. */
function placeOf(element, at, numRows) {
  if (!isCell(element)) return `0 calc(100% - 2px - ${numRows - 1 - at} * var(--row))`;
  return numRows === 1 ? "0 0" : `0 ${((100 * at) / (numRows - 1)).toFixed(2)}%`;
}
