// Short ways to make elements. Never sets markup or `style` attributes: the page's policy forbids both.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = new URL("icons.svg", import.meta.url);

export const byId = (id) => document.getElementById(id);

/** An element; `false`, `null` and `undefined` leave an attribute out, `true` sets it empty. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A picture out of `icons.svg`, in the colour of the text around it. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `${ICONS}#${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon, and with words unless they are only its label. */
export function button({ icon: name, label, words = "", onClick, ...attributes }) {
  const node = make("button", {
    type: "button",
    "aria-label": words === label ? null : label,
    title: words === label ? null : label,
    ...attributes,
  });
  if (name) node.append(icon(name));
  if (words) node.append(make("span", {}, words));
  node.addEventListener("click", onClick);
  return node;
}

export function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}
