// The API key: where it is kept, and the dialog that asks for it.

import { byId } from "./dom.js";
import { read, write } from "./storage.js";

const NAME = "api-key";
const ASKS = "Whoever runs the server has one for you.";
const REFUSED = "The server did not accept that key. Try another one.";

/** Owns the key. It lives as long as the tab, or longer if the user said so. */
export class Keyring {
  #asking = null;

  constructor() {
    this.dialog = byId("key-dialog");
    this.form = byId("key-form");
    this.input = byId("key");
    this.value = read(NAME, sessionStorage) ?? read(NAME);
    byId("key-cancel").addEventListener("click", () => this.dialog.close());
    byId("key-forget").addEventListener("click", () => this.#keep(null));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.input.value.trim()) return;
      this.#keep(this.input.value.trim());
      this.dialog.close("given");
    });
    this.#tell();
  }

  /**
   * Asks for a key because the one that was `used` is not good. Many calls may wait for one
   * dialog, and a call that comes after another key was given goes on at once.
   * Resolves to whether there is another key now.
   */
  async ask(used) {
    if (this.value !== used) return true;
    this.#asking ??= this.#open(used).finally(() => {
      this.#asking = null;
    });
    return this.#asking;
  }

  #open(used) {
    byId("key-reason").textContent = used === null ? ASKS : REFUSED;
    this.input.value = "";
    this.dialog.returnValue = "";
    this.dialog.showModal();
    this.input.focus();
    return new Promise((resolve) => {
      const onClose = () => resolve(this.dialog.returnValue === "given");
      this.dialog.addEventListener("close", onClose, { once: true });
    });
  }

  #keep(value) {
    this.value = value;
    const isRemembered = value !== null && byId("key-remember").checked;
    write(NAME, value, sessionStorage);
    write(NAME, isRemembered ? value : null);
    this.#tell();
  }

  #tell() {
    byId("key-section").hidden = this.value === null;
    const where = read(NAME) === null ? "until this tab is closed" : "on this computer";
    byId("key-state").textContent = `Kept ${where}.`;
  }
}
