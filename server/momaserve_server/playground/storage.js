// What the browser remembers. Pages of one origin share it, so names carry the page's own path.

const PREFIX = `momaserve:${new URL(".", document.baseURI).pathname}:`;

/** A value that was written, or null. A browser that keeps nothing is no error. */
export function read(name, storage = localStorage) {
  try {
    return JSON.parse(storage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

/** Keeps a value; null forgets it. */
export function write(name, value, storage = localStorage) {
  try {
    if (value === null) storage.removeItem(PREFIX + name);
    else storage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Private windows and full disks: the page works without.
  }
}
