// What the server is doing right now. Asks it only while something runs and somebody looks.

import { byId, make, plural } from "./dom.js";
import { loadBetween, stateOf } from "./metrics.js";

const SOON_MS = 250; // after the first look, which comes before the server is at work
const INTERVAL_MS = 1000;
const MAX_READS = 10;
const MAX_SECONDS = 60;

/** Owns the live section of the panel. */
export class Gauges {
  #api;
  #reads = []; // {at, router}: of the present run and the one before it, the newest last
  #numOwn = 0;
  #isBusy = false;
  #timer = null;
  #isReading = false;
  #pace = null;
  #frame = null;
  #maxLen = null;

  constructor(api) {
    this.#api = api;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#rest();
      else if (this.#isActive) this.#look();
    });
  }

  get #isActive() {
    return this.#numOwn > 0 || this.#isBusy;
  }

  get #waitMs() {
    return this.#reads.length < 2 ? SOON_MS : INTERVAL_MS;
  }

  /** Shows what there is, once; goes on only if other people keep the server busy. */
  start(maxModelLen) {
    this.#maxLen = maxModelLen;
    return this.#look();
  }

  /** An answer of this page begins, whose pace is shown. */
  begin(pace) {
    if (!this.#isActive) this.#reads = this.#reads.slice(-1);
    this.#numOwn += 1;
    this.#pace = pace;
    this.paceChanged();
    this.#look();
  }

  end() {
    this.#numOwn -= 1;
    this.#isBusy = true; // until the server itself says otherwise
    this.#look();
  }

  /** Call it as often as there is news; it is shown once per frame. */
  paceChanged() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.#showPace(this.#pace);
    });
  }

  #rest() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  async #look() {
    if (this.#isReading || document.hidden) return;
    this.#rest();
    this.#isReading = true;
    const numOwn = this.#numOwn;
    try {
      const [metrics, router] = await Promise.all([
        this.#api.request("metrics", { mayAsk: false }).then((response) => response.text()),
        this.#api.json("v1/router", { mayAsk: false }),
      ]);
      const state = stateOf(metrics);
      this.#isBusy = state.numRunning + state.numWaiting > 0;
      this.#showState(state);
      this.#take(router);
    } catch {
      this.#isBusy = false; // a question of the user's will say what is wrong
      this.#showState({ numRunning: null, numWaiting: null, kvUsage: null });
    }
    this.#isReading = false;
    if (numOwn !== this.#numOwn) this.#look(); // something began or ended meanwhile
    else if (this.#isActive) this.#timer = setTimeout(() => this.#look(), this.#waitMs);
  }

  #take(router) {
    if (this.#reads.length && router.num_steps < this.#reads.at(-1).router.num_steps) {
      this.#reads = []; // another server than before
    }
    this.#reads.push({ at: performance.now(), router });
    this.#reads = this.#reads.slice(-MAX_READS);
    const first = this.#reads[0];
    if (router.num_steps > first.router.num_steps) {
      const seconds = Math.max(1, Math.round((performance.now() - first.at) / 1000));
      const since = seconds > MAX_SECONDS ? "since the last look" : `last ${seconds} s`;
      this.#showLoad(loadBetween(first.router, router), since);
    } else if (!this.#isActive) {
      this.#showLoad(loadBetween(null, router), "since the server started");
    }
  }

  #showState({ numRunning, numWaiting, kvUsage }) {
    byId("gauge-running").textContent = numRunning ?? "–";
    byId("gauge-waiting").textContent = numWaiting ?? "–";
    byId("gauge-kv").textContent = kvUsage === null ? "–" : percent(kvUsage);
    byId("gauge-kv-bar").value = kvUsage ?? 0;
  }

  #showPace(pace) {
    const { firstMs, tokensPerSecond: speed, numTokens, usage } = pace;
    byId("gauge-speed").textContent = speed === null ? "–" : speed.toFixed(speed < 10 ? 1 : 0);
    byId("gauge-first").textContent = firstMs === null ? "–" : `${Math.round(firstMs)} ms`;
    byId("gauge-spent").textContent = spent(numTokens, usage);
    const total = usage?.total_tokens;
    byId("gauge-context").textContent = total ? percent(total / this.#maxLen) : "–";
    byId("gauge-context-bar").value = total ? total / this.#maxLen : 0;
  }

  #showLoad(groups, since) {
    byId("load-since").textContent = since;
    byId("load").replaceChildren(...groups.map(blockOf));
  }
}

function blockOf({ name, numExperts, meanExperts, layers }) {
  const isIdle = layers.every(({ shares }) => shares === null);
  const mean = meanExperts === null ? "" : `${meanExperts.toFixed(2)} experts per token`;
  const note = numExperts === 1 ? "dense" : isIdle ? "no token yet" : mean;
  const head = make("h4", { class: "load-name" }, name, make("span", {}, note));
  const rows = isIdle ? [] : layers.map((row) => barOf(row, numExperts));
  return make("div", { class: "load-group" }, head, ...rows);
}

function barOf({ layer, shares }, numExperts) {
  const bar = make("span", { class: "load-bar" });
  bar.style.setProperty("--experts", numExperts);
  for (const [expert, share] of (shares ?? []).entries()) {
    const piece = make("i", { class: `expert-${expert % 8}`, title: `${expert}: ${percent(share)}` });
    piece.style.flexGrow = share;
    bar.append(piece);
  }
  const words = shares?.map((share, expert) => `expert ${expert} ${percent(share)}`).join(", ");
  return make(
    "div",
    { class: "load-row", role: "img", "aria-label": `layer ${layer}: ${words ?? "no token"}` },
    make("span", { class: "load-layer" }, String(layer)),
    bar,
  );
}

function spent(numTokens, usage) {
  if (usage === null) return plural(numTokens, "token");
  const { prompt_tokens: prompt, completion_tokens: answer } = usage;
  const numImage = usage.completion_tokens_details?.image_tokens ?? 0;
  const ofPictures = numImage ? `, ${numImage.toLocaleString("en")} of pictures` : "";
  return `${plural(prompt, "prompt token")} + ${answer.toLocaleString("en")} in the answer${ofPictures}`;
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}
