// The sampling fields: their bounds (docs/api.md), what is in them, and what is kept of it.

import { byId, make } from "./dom.js";
import { read, write } from "./storage.js";

const NAME = "settings";
const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;
const INTEGER = /^[-+]?\d+$/;
const MAX_SEED = 2n ** 63n - 1n;

/** `low` and `high` are allowed themselves, `above` is not. */
export const FIELDS = [
  { name: "temperature", group: "text", low: 0, high: 100, help: "0 always takes the likeliest" },
  { name: "top_p", group: "text", above: 0, high: 1, help: "Keeps the likeliest up to this share" },
  { name: "top_k", group: "text", low: -1, isInteger: true, help: "Keeps so many; 0 keeps all" },
  { name: "min_p", group: "text", low: 0, high: 1, help: "Drops what is less likely, by share" },
  { name: "image_temperature", group: "image", low: 0, high: 100, help: "The same for pictures" },
  { name: "image_top_p", group: "image", above: 0, high: 1, help: "The same for pictures" },
  { name: "image_top_k", group: "image", low: 0, isInteger: true, help: "The same for pictures" },
  {
    name: "guidance_scale",
    group: "image",
    low: 0,
    high: 20,
    help: "How closely pictures follow the prompt; 1 is no guidance",
  },
  { name: "seed", group: "answer", low: 0n, high: MAX_SEED, isInteger: true, help: "Fixes chance" },
  { name: "max_tokens", group: "answer", low: 1, isInteger: true, help: "Picture tokens included" },
  {
    name: "routing",
    group: "answer",
    choices: ["causal", "calibrated"],
    help: "How tokens find their experts",
  },
];

/** What is wrong with a field's text; null for nothing. Empty means the server's default. */
export function problemOf(field, text) {
  const given = text.trim();
  if (given === "") return null;
  if (field.choices) return field.choices.includes(given) ? null : "is not one of the choices";
  if (!(field.isInteger ? INTEGER : NUMBER).test(given)) {
    return field.isInteger ? "must be a whole number" : "must be a number";
  }
  const value = field.isInteger ? BigInt(given) : Number(given);
  const isInside =
    (field.low === undefined || value >= field.low) &&
    (field.above === undefined || value > field.above) &&
    (field.high === undefined || value <= field.high);
  return isInside ? null : `must be ${boundsOf(field)}`;
}

/** "0 to 100", "above 0, at most 1", "at least 1". */
export function boundsOf({ low, above, high }) {
  if (high === MAX_SEED) return "0 to 2^63 - 1";
  if (above !== undefined) return `above ${above}, at most ${high}`;
  return high === undefined ? `at least ${low}` : `${low} to ${high}`;
}

/** JSON of a field's text. Seeds are longer than JavaScript's numbers, so their digits are kept. */
export function jsonOf(field, text) {
  const given = text.trim();
  if (field.choices) return JSON.stringify(given);
  return String(field.isInteger ? BigInt(given) : Number(given));
}

/** Owns the fields on the page and what is remembered of them. */
export class Settings {
  #inputs = new Map();
  #switches = [byId("show-routing"), byId("send-history")];

  constructor() {
    for (const field of FIELDS) this.#build(field);
    this.system = byId("system");
    this.modes = byId("modes");
    this.#restore(read(NAME) ?? {});
    this.system.addEventListener("input", () => this.#save());
    for (const node of [this.modes, ...this.#switches]) {
      node.addEventListener("change", () => this.#save());
    }
    byId("reset").addEventListener("click", () => this.reset());
  }

  get mode() {
    return this.modes.querySelector("input:checked").value;
  }

  set mode(value) {
    this.modes.querySelector(`input[value="${value}"]`).checked = true;
    this.#save();
  }

  get sendsHistory() {
    return byId("send-history").checked;
  }

  /** The fields that are set, as JSON texts by name. */
  given() {
    const given = FIELDS.map((field) => [field, this.#inputs.get(field.name)]).filter(
      ([, input]) => !input.disabled && input.value.trim(),
    );
    return Object.fromEntries(given.map(([f, input]) => [f.name, jsonOf(f, input.value)]));
  }

  /** Marks what is wrong; the first such field, or null. */
  check() {
    const wrong = FIELDS.filter((field) => !this.#validate(field));
    return wrong[0]?.name ?? null;
  }

  has(name) {
    return this.#inputs.has(name);
  }

  focus(name) {
    this.#inputs.get(name).focus();
  }

  /** Marks a field that the server refused. */
  mark(name, problem) {
    const input = this.#inputs.get(name);
    const note = byId(`${name}-problem`);
    note.textContent = problem ?? "";
    note.hidden = problem === null;
    input.setAttribute("aria-invalid", String(problem !== null));
  }

  /** Shows what the server takes for fields that are left empty. */
  showDefaults(defaults) {
    for (const [name, value] of Object.entries(defaults)) {
      const input = this.#inputs.get(name);
      if (!input || value === null) continue;
      if (input.options) input.options[0].text = `${value} (default)`;
      else input.placeholder = value;
    }
  }

  disable(names) {
    for (const name of names) this.#inputs.get(name).disabled = true;
  }

  reset() {
    for (const [name, input] of this.#inputs) {
      input.value = "";
      this.mark(name, null);
    }
    this.system.value = "";
    this.#save();
  }

  #build(field) {
    const id = `field-${field.name}`;
    const note = make("small", { id: `${field.name}-problem`, class: "field-problem", hidden: true });
    const shared = { id, title: field.help, "aria-describedby": note.id };
    const input = field.choices
      ? make("select", shared, ...["", ...field.choices].map((c) => make("option", { value: c }, c)))
      : make("input", {
          ...shared,
          title: `${field.help}: ${boundsOf(field)}`,
          type: "text",
          inputmode: field.isInteger ? "numeric" : "decimal",
          autocomplete: "off",
          placeholder: { seed: "random", max_tokens: "room left" }[field.name] ?? "default",
        });
    if (field.choices) input.options[0].text = "server’s default";
    const label = make("label", { for: id }, field.name);
    byId(`fields-${field.group}`).append(make("div", { class: "field" }, label, input, note));
    this.#inputs.set(field.name, input);
    input.addEventListener("input", () => {
      this.#validate(field);
      this.#save();
    });
  }

  #validate(field) {
    const problem = problemOf(field, this.#inputs.get(field.name).value);
    this.mark(field.name, problem);
    return problem === null;
  }

  #save() {
    const fields = [...this.#inputs].map(([name, input]) => [name, input.value]);
    write(NAME, {
      fields: Object.fromEntries(fields.filter(([, text]) => text !== "")),
      mode: this.mode,
      system: this.system.value,
      switches: Object.fromEntries(this.#switches.map((node) => [node.id, node.checked])),
    });
  }

  #restore({ fields = {}, mode, system = "", switches = {} }) {
    for (const [name, input] of this.#inputs) input.value = fields[name] ?? "";
    for (const node of this.#switches) node.checked = switches[node.id] ?? node.checked;
    this.system.value = system;
    if (mode) this.modes.querySelector(`input[value="${mode}"]`).checked = true;
    this.check();
  }
}
