// What went wrong, beside the answer that it cost, and what can be done about it.

import { button, make } from "./dom.js";

const ADVICE = {
  queue_full: "The server has as many requests as it takes.",
  draining: "It may be back soon.",
  not_ready: "The server is still starting.",
  engine_stuck: "The engine makes no progress; the operator has to look at it.",
  engine_dead: "The engine has stopped; the operator has to start it again.",
  unreachable: "Is it still running, and is the network up?",
  request_aborted: "Somebody ended it.",
  invalid_api_key: "The server wants a key.",
  body_too_large: "Attach fewer or smaller pictures, or begin a new conversation.",
  invalid_prompt: "If the conversation has become too long, begin a new one.",
};

/**
 * An alert for an error, with buttons.
 * @param actions {again, showField, startNew}; `showField` is null where no field is to blame
 */
export function alertOf(error, { again, showField, startNew }) {
  const wait = error.retryAfterS;
  const advice = [ADVICE[error.code], wait && `Try again in ${wait} s.`].filter(Boolean).join(" ");
  const buttons = make("p", { class: "problem-actions" });
  if (showField) {
    buttons.append(button({ words: `Show ${error.param}`, class: "plain", onClick: showField }));
  } else {
    const retry = button({ icon: "redo", words: "Try again", class: "plain", onClick: again });
    if (wait) countDown(retry, wait);
    buttons.append(retry);
  }
  if (error.code === "invalid_prompt" || error.code === "body_too_large") {
    buttons.append(button({ words: "New conversation", class: "plain", onClick: startNew }));
  }
  return make(
    "div",
    { class: "problem", role: "alert" },
    make("p", {}, error.message, " ", make("code", {}, codeOf(error))),
    ...(advice ? [make("p", { class: "advice" }, advice)] : []),
    buttons,
  );
}

function codeOf({ status, code }) {
  return [status || null, code].filter(Boolean).join(" ");
}

function countDown(retry, seconds) {
  const words = retry.querySelector("span");
  const whole = words.textContent;
  let left = Math.ceil(seconds);
  const show = () => {
    retry.disabled = left > 0;
    words.textContent = left > 0 ? `${whole} in ${left} s` : whole;
  };
  const timer = setInterval(() => {
    left -= 1;
    show();
    if (left <= 0 || !retry.isConnected) clearInterval(timer);
  }, 1000);
  show();
}
