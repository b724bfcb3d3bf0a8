// The pictures that go with the next question.

import { button, byId, make } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** Owns the thumbnails above the prompt. */
export class Attachments {
  #pictures = []; // {name, url}
  #limits = { images_per_request: Infinity, image_bytes: Infinity };

  /** @param onAdded called after pictures came @param tell (words, isProblem) */
  constructor({ onAdded, tell }) {
    this.list = byId("attachments");
    this.file = byId("file");
    this.attach = byId("attach");
    this.onAdded = onAdded;
    this.tell = tell;
    this.file.accept = TYPES.join(",");
    this.attach.addEventListener("click", () => this.file.click());
    this.file.addEventListener("change", () => {
      this.add([...this.file.files]);
      this.file.value = ""; // the same file may be chosen again
    });
    document.addEventListener("paste", (event) => {
      const { files, types } = event.clipboardData;
      if (files.length === 0 || types.includes("text/plain")) return; // words come with a picture
      event.preventDefault();
      this.add([...files]);
    });
    for (const type of ["dragover", "dragleave", "drop"]) {
      document.addEventListener(type, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        document.documentElement.toggleAttribute("data-dropping", type === "dragover");
        if (type === "drop") this.add([...event.dataTransfer.files]);
      });
    }
  }

  /** @param limits `limits` of the model */
  describe(limits) {
    this.#limits = limits;
  }

  disable(why) {
    this.attach.disabled = true;
    this.attach.title = why;
  }

  get count() {
    return this.#pictures.length;
  }

  /** All of them; there are none afterwards. */
  take() {
    const pictures = this.#pictures;
    this.#pictures = [];
    this.#show();
    return pictures;
  }

  async add(files) {
    if (this.attach.disabled || files.length === 0) return;
    const good = files.filter((file) => this.#isFine(file));
    const room = this.#limits.images_per_request - this.#pictures.length;
    if (good.length > room) {
      this.tell(`A question may have ${this.#limits.images_per_request} pictures.`, true);
    }
    const read = await Promise.all(
      good.slice(0, room).map(async (file) => ({ name: file.name, url: await dataUrlOf(file) })),
    );
    if (read.length === 0) return;
    this.#pictures.push(...read);
    this.#show();
    this.onAdded();
    if (read.length === files.length) {
      this.tell(`Attached ${read.map(({ name }) => name).join(", ")}.`, false);
    }
  }

  #isFine(file) {
    const { image_bytes: maxBytes } = this.#limits;
    const name = file.name || "The file";
    if (!TYPES.includes(file.type)) {
      this.tell(`${name} is not a picture that can be read: PNG, JPEG, WebP, GIF or BMP.`, true);
    } else if (file.size > maxBytes) {
      this.tell(`${name} has ${file.size} bytes; the limit is ${maxBytes}.`, true);
    } else {
      return true;
    }
    return false;
  }

  #show() {
    this.list.hidden = this.#pictures.length === 0;
    this.list.replaceChildren(
      ...this.#pictures.map((picture, at) =>
        make(
          "li",
          {},
          make("img", { src: picture.url, alt: picture.name, title: picture.name }),
          button({
            icon: "close",
            label: `Remove ${picture.name}`,
            class: "remove",
            onClick: () => this.#remove(at),
          }),
        ),
      ),
    );
  }

  #remove(at) {
    this.#pictures.splice(at, 1);
    this.#show();
    const next = this.list.querySelectorAll("button")[Math.min(at, this.#pictures.length - 1)];
    (next ?? this.attach).focus();
  }
}

function dataUrlOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
