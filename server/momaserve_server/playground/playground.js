// The playground: puts its parts together and connects them with the page.

import { Api } from "./api.js";
import { Attachments } from "./attachments.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { Gauges } from "./gauges.js";
import { Keyring } from "./key.js";
import { Panel } from "./panel.js";
import { RoutingView } from "./routing.js";
import { Settings } from "./settings.js";
import { startTheme } from "./theme.js";

const IMAGE_FIELDS = ["image_temperature", "image_top_p", "image_top_k", "guidance_scale"];
const NO_PICTURES = "This model knows no pictures.";

const prompt = byId("prompt");
const note = byId("note");
const hasKeyboard = matchMedia("(pointer: fine)").matches;

startTheme();
const api = new Api(new Keyring());
const settings = new Settings();
const panel = new Panel();
const routing = new RoutingView(byId("turns"));
const gauges = new Gauges(api);
const chat = new Chat({ api, settings, gauges, routing, panel, tell, onBusy });
const attachments = new Attachments({ tell, onAdded });

/** Says something to those who do not see the page; problems are shown as well. */
function tell(words, isProblem = false) {
  byId("announcer").textContent = isProblem ? "" : words;
  note.textContent = isProblem ? words : "";
  note.hidden = !isProblem;
}

function onBusy(isBusy) {
  const own = [document.body, prompt, byId("send"), byId("stop")];
  const isHere = own.includes(document.activeElement); // not elsewhere, looking at tokens
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  if (isBusy) tell("Generating.");
  if (!hasKeyboard) prompt.blur(); // the on-screen keyboard would hide the answer
  else if (isHere) prompt.focus();
}

function onAdded() {
  if (settings.mode === "image") settings.mode = "text"; // a question about it, not a wish
  prompt.focus();
}

function send() {
  const text = prompt.value.trim();
  if (chat.isRunning || (!text && attachments.count === 0)) {
    prompt.focus();
    return;
  }
  const wrong = settings.check();
  if (wrong) {
    tell(`Look at ${wrong}: its value cannot be sent.`, true);
    panel.open();
    settings.focus(wrong);
    return;
  }
  tell("");
  prompt.value = "";
  prompt.style.height = "";
  chat.ask(text, attachments.take());
}

/** As high as its text, where the browser does not see to that. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

async function describe() {
  const line = byId("model");
  try {
    const model = (await api.json("v1/models")).data[0];
    line.textContent = model.id;
    line.title = `${model.id}: context ${model.max_model_len} tokens`;
    line.dataset.state = "up";
    if (!model.image?.size) offerTextOnly();
    chat.describe(model);
    routing.describe(model.expert_groups);
    attachments.describe(model.limits);
    settings.showDefaults(model.defaults);
    await gauges.start(model.max_model_len);
  } catch (error) {
    line.textContent = error.message;
    line.dataset.state = "down";
    byId("reconnect").hidden = false;
  }
}

function offerTextOnly() {
  for (const id of ["mode-image", "mode-both"]) {
    byId(id).disabled = true;
    byId(id).title = NO_PICTURES;
  }
  settings.mode = "text";
  settings.disable(IMAGE_FIELDS);
  attachments.disable(NO_PICTURES);
  for (const example of document.querySelectorAll("[data-mode]:not([data-mode=text])")) {
    example.hidden = true;
  }
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
if (!CSS.supports("field-sizing", "content")) prompt.addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) {
    return;
  }
  routing.inspector.hide();
  if (panel.isOpen) panel.close();
  else chat.stop();
});
byId("stop").addEventListener("click", () => chat.stop());
byId("new").addEventListener("click", () => {
  chat.startNew();
  prompt.focus();
});
byId("reconnect").addEventListener("click", () => {
  byId("reconnect").hidden = true;
  describe();
});
byId("examples").addEventListener("click", ({ target }) => {
  const example = target.closest("button");
  if (!example) return;
  settings.mode = example.dataset.mode;
  prompt.value = example.textContent.trim();
  send();
});

describe();
