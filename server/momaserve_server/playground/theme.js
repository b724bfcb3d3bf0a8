// Dark or light: as the system has it, until somebody says otherwise.

import { byId, icon } from "./dom.js";
import { read, write } from "./storage.js";

const NAME = "theme";

export function startTheme() {
  const toggle = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    const other = isDark() ? "light" : "dark";
    toggle.replaceChildren(icon(isDark() ? "sun" : "moon"));
    toggle.setAttribute("aria-label", `Use ${other} colours`);
    toggle.title = `Use ${other} colours`;
  };

  const chosen = read(NAME);
  if (chosen !== null) root.dataset.theme = chosen;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    write(NAME, root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}
