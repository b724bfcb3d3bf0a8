// The playground: one request at a time over the same API that everybody uses.

import { eventData } from "./sse.js";

const MAX_CARDS = 20;
const PARTIAL_IMAGES = 8; // each costs the server some milliseconds
const MODALITIES = { text: ["text"], image: ["image"], both: ["text", "image"] };

const element = (id) => document.getElementById(id);
const promptBox = element("prompt");
const hasKeyboard = matchMedia("(pointer: fine)").matches;
const results = element("results");

let maxImageBytes = Infinity;
let attachment = null; // {url, name} of the picture to send
let running = null; // AbortController of the request under way

// --- what is served ------------------------------------------------------------------------

async function describeModel() {
  const line = element("model");
  try {
    const response = await fetch("/v1/models");
    if (!response.ok) throw new Error(await problemOf(response));
    const model = (await response.json()).data[0];
    maxImageBytes = model.limits.image_bytes;
    line.textContent = model.id;
    line.title = `${model.id}: context ${model.max_model_len} tokens`;
    delete line.dataset.state;
    offerOnly(model);
  } catch (error) {
    line.textContent = `not reachable: ${error.message}`;
    line.dataset.state = "down";
  }
}

function offerOnly(model) {
  if (model.image?.size) return;
  for (const id of ["mode-image", "mode-both", "attach", "guidance"]) {
    element(id).disabled = true;
    element(id).title = "This model knows no pictures.";
  }
  element("mode-text").checked = true;
}

async function problemOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// --- the picture to send -------------------------------------------------------------------

function attach(file) {
  if (!file || element("attach").disabled) return;
  if (!file.type.startsWith("image/")) {
    announce(`${file.name} is not a picture.`, true);
    return;
  }
  if (file.size > maxImageBytes) {
    announce(`${file.name} has ${file.size} bytes; the limit is ${maxImageBytes}.`, true);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => {
    attachment = { url: reader.result, name: file.name };
    element("thumbnail").src = attachment.url;
    element("attachment-name").textContent = attachment.name;
    element("attachment").hidden = false;
    if (element("mode-image").checked) element("mode-text").checked = true;
    announce(`Attached ${file.name}.`);
    promptBox.focus();
  };
  reader.readAsDataURL(file);
}

function detach() {
  attachment = null;
  element("file").value = "";
  element("thumbnail").removeAttribute("src");
  element("attachment").hidden = true;
}

// --- one request ---------------------------------------------------------------------------

function requestBody() {
  const content = [];
  if (attachment) content.push({ type: "image_url", image_url: { url: attachment.url } });
  if (promptBox.value.trim()) content.push({ type: "text", text: promptBox.value.trim() });
  const mode = new FormData(element("composer")).get("mode");
  const body = {
    messages: [{ role: "user", content }],
    modalities: MODALITIES[mode],
    partial_images: PARTIAL_IMAGES,
    return_token_ids: true,
    stream: true,
    stream_options: { include_usage: true },
  };
  const seed = element("seed").value;
  const temperature = element("temperature").value;
  const guidance = element("guidance").value;
  const maxTokens = element("max-tokens").value;
  if (seed !== "") body.seed = Number(seed);
  if (temperature !== "") {
    body.temperature = Number(temperature);
    body.image_temperature = Number(temperature);
  }
  if (guidance !== "") body.guidance_scale = Number(guidance);
  if (maxTokens !== "") body.max_tokens = Number(maxTokens);
  return body;
}

async function send() {
  if (running || (!promptBox.value.trim() && !attachment)) {
    promptBox.focus();
    return;
  }
  const body = requestBody();
  const card = new Card(promptBox.value.trim(), attachment);
  running = new AbortController();
  setBusy(true);
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const data of eventData(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      card.take(chunk);
    }
    card.finish();
    if (attachment) detach();
    promptBox.select(); // typing replaces it, Enter asks again
  } catch (error) {
    if (error.name === "AbortError") card.finish("stopped");
    else card.fail(error.message);
  } finally {
    running = null;
    setBusy(false);
  }
}

function setBusy(isBusy) {
  element("send").hidden = isBusy;
  element("stop").hidden = !isBusy;
  if (hasKeyboard) promptBox.focus();
  else promptBox.blur(); // the on-screen keyboard would hide the answer
}

function announce(text, isProblem = false) {
  element("announcer").textContent = text;
  if (isProblem) new Card("", null).fail(text);
}

/** One answer: its text, its growing pictures, its speed. */
class Card {
  constructor(asked, picture) {
    this.node = element("card").content.cloneNode(true).firstElementChild;
    this.answer = this.node.querySelector(".answer");
    this.node.querySelector(".asked").textContent = asked;
    if (picture) {
      const image = this.node.querySelector(".asked-picture");
      image.src = picture.url;
      image.hidden = false;
    }
    if (!asked && !picture) this.node.querySelector("header").remove();
    this.asked = asked;
    this.pictures = new Map();
    this.words = null;
    this.numTokens = 0;
    this.numCached = 0;
    this.sentAt = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.reason = null;
    this.node.classList.add("running");
    element("empty")?.remove();
    results.prepend(this.node);
    while (results.children.length > MAX_CARDS) results.lastElementChild.remove();
  }

  take(chunk) {
    this.numCached = chunk.usage?.prompt_tokens_details?.cached_tokens ?? this.numCached;
    const choice = chunk.choices[0];
    if (!choice) return;
    if (choice.delta.content) this.addText(choice.delta.content);
    if (choice.delta.image) this.showPicture(choice.delta.image);
    if (choice.token_ids?.length) this.count(choice.token_ids.length);
    if (choice.finish_reason) this.reason = choice.finish_reason;
  }

  addText(text) {
    if (!this.words) {
      this.words = document.createElement("span");
      this.words.className = "words";
      this.answer.append(this.words);
    }
    this.words.append(text);
  }

  showPicture({ index, tokens_done: done, tokens_total: total, b64_json: png }) {
    let figure = this.pictures.get(index);
    if (!figure) {
      figure = element("picture").content.cloneNode(true).firstElementChild;
      this.pictures.set(index, figure);
      this.answer.append(figure);
      this.words = null; // text after a picture starts below it
    }
    const isWhole = done === total;
    const image = figure.querySelector("img");
    image.src = `data:image/png;base64,${png}`;
    image.alt = isWhole ? `Picture: ${this.asked || "answer"}` : "Picture, still growing";
    figure.querySelector("progress").value = done / total;
    figure.querySelector("progress").hidden = isWhole;
    this.node.classList.toggle("drawing", !isWhole);
  }

  count(numTokens) {
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.numTokens += numTokens;
    this.showSpeed();
  }

  showSpeed() {
    const facts = [`${this.numTokens} token${this.numTokens === 1 ? "" : "s"}`];
    if (this.firstAt !== null) {
      const seconds = (this.lastAt - this.sentAt) / 1000; // the wait for the first one included
      facts.push(`${(this.numTokens / seconds).toFixed(0)} tokens/s`);
      facts.push(`first after ${(this.firstAt - this.sentAt).toFixed(0)} ms`);
    }
    if (this.numCached > 0) {
      facts.push(`${this.numCached} prompt token${this.numCached === 1 ? "" : "s"} cached`);
    }
    if (this.reason === "timeout") facts.push("cut at the time limit");
    if (this.reason === "length") facts.push("cut at the length limit");
    if (this.reason === "stopped") facts.push("stopped");
    this.node.querySelector("footer").textContent = facts.join(" · ");
  }

  finish(reason = this.reason) {
    this.reason = reason;
    this.node.classList.remove("running", "drawing");
    if (this.words === null && this.pictures.size === 0 && reason !== "stopped") {
      this.addText("(an empty answer)");
    }
    this.showSpeed();
    const words = this.answer.textContent;
    const pictures = this.pictures.size > 0 ? "Picture ready. " : "";
    announce(reason === "stopped" ? "Stopped." : `${pictures}${words}`);
  }

  fail(message) {
    const problem = this.node.querySelector(".problem");
    problem.textContent = message;
    problem.hidden = false;
    this.node.classList.remove("running", "drawing");
    if (this.numTokens > 0) this.showSpeed();
  }
}

// --- theme ---------------------------------------------------------------------------------

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemIsDark.matches;
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  element("theme").textContent = isDark() ? "Light" : "Dark";
  element("theme").title = `Switch to ${isDark() ? "light" : "dark"} colours`;
}

// --- wiring --------------------------------------------------------------------------------

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
promptBox.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
element("stop").addEventListener("click", () => running?.abort());
element("attach").addEventListener("click", () => element("file").click());
element("file").addEventListener("change", (event) => attach(event.target.files[0]));
element("detach").addEventListener("click", () => {
  detach();
  promptBox.focus();
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) attach(file);
});
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    element("composer").classList.toggle("dropping", type === "dragover");
    if (type === "drop") attach(event.dataTransfer.files[0]);
  });
}
element("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", theme);
  setTheme(theme);
});
systemIsDark.addEventListener("change", () => setTheme());

setTheme(localStorage.getItem("theme"));
describeModel();
