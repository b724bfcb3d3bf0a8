// The panel: beside the conversation where there is room, over it where there is none.

import { byId } from "./dom.js";

/** Owns whether the panel covers the page. Where it stands beside, it is always there. */
export class Panel {
  constructor() {
    this.node = byId("panel");
    this.opener = byId("open-panel");
    this.closer = byId("close-panel");
    this.others = [byId("top"), byId("chat")];
    this.isNarrow = matchMedia("(max-width: 63.99rem)");
    this.opener.addEventListener("click", () => this.open());
    this.closer.addEventListener("click", () => this.close());
    this.isNarrow.addEventListener("change", () => this.#set(false));
  }

  get isOpen() {
    return this.node.hasAttribute("data-open");
  }

  open() {
    if (!this.isNarrow.matches) return;
    this.#set(true);
    this.closer.focus();
  }

  close() {
    this.#set(false);
    this.opener.focus();
  }

  #set(isOpen) {
    this.node.toggleAttribute("data-open", isOpen);
    this.opener.setAttribute("aria-expanded", String(isOpen));
    for (const node of this.others) node.inert = isOpen;
  }
}
