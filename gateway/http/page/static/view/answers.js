// The answers to a turn: the choices side by side, how they ended, their usage and timings.

import { chosenText } from "../dialog/dialog.js";
import { button, copy, element } from "./dom.js";
import { legend, TokenView } from "./tokens.js";

const FENCE = /^```.*\n([\s\S]*?)(?:^```[ \t]*$\n?|(?![\s\S]))/gm;

/** `actions`: regenerate, choose, showTokens. `context` is the model's, in tokens. */
export class AnswersView {
  constructor(answer, { key, showsTokens, context, actions }) {
    this._answer = answer;
    this._context = context;
    this._key = key;
    this._actions = actions;
    this._showsTokens = showsTokens;
    this._choices = answer.choices.map((choice, index) => this._choice(choice, index));
    this._notes = element("div", { class: "notes" });
    this._figures = element("p", { class: "figures" });
    this._buttons = element("div", { class: "actions" });
    const several = answer.choices.length > 1;
    this.element = element(
      "article",
      { class: several ? "answers several" : "answers", "aria-label": "Answer" },
      this._choices.some(({ tokens }) => tokens) ? legend() : null,
      element("div", { class: "choices" }, ...this._choices.map(({ box }) => box)),
      this._notes,
      element("footer", {}, this._buttons, this._figures),
    );
    this.update();
  }

  /** Shows what the answer has become. */
  update() {
    const answer = this._answer;
    for (const each of this._choices) each.update();
    const isRunning = answer.state === "running";
    this.element.setAttribute("aria-busy", String(isRunning));
    this.element.classList.toggle("empty", answer.choices.every(({ text }) => !text));
    this._figures.textContent = figures(answer);
    this._notes.replaceChildren(...this._endings(), ...this._failure());
    if (this._shownState === answer.state) return;
    this._shownState = answer.state;
    this._buttons.replaceChildren(...(isRunning ? [] : this._actionButtons()));
  }

  _choice(choice, index) {
    const several = this._answer.choices.length > 1;
    const label = several ? `Answer ${index + 1}` : "Answer";
    const tokens = this._showsTokens && choice.tokens.length ? new TokenView(choice, label) : null;
    const prose = element("div", { class: "prose" });
    const box = element("div", { class: "choice" }, several ? this._head(index) : null);
    box.append(tokens ? tokens.element : prose);
    let shown = null;
    const update = () => {
      tokens?.update();
      if (tokens || shown === choice.text) return;
      shown = choice.text;
      replaceChanged(prose, blocks(choice.text));
    };
    return { box, tokens, update };
  }

  _head(index) {
    const isChosen = index === this._answer.chosen;
    return element(
      "div",
      { class: "choice-head" },
      element("span", {}, `Answer ${index + 1}`),
      button(isChosen ? "Chosen" : "Choose", () => this._actions.choose(index), {
        key: `${this._key}-choose-${index}`,
        "aria-pressed": String(isChosen),
        "aria-label": isChosen ? `Chosen: answer ${index + 1}` : `Choose answer ${index + 1}`,
        class: "quiet",
        title: "The conversation continues from the chosen answer",
        "data-idle": true,
      }),
    );
  }

  _actionButtons() {
    const answer = this._answer;
    const quiet = (name) => ({ class: "quiet", key: `${this._key}-${name}` });
    const buttons = [];
    if (chosenText(answer)) {
      buttons.push(button("Copy", () => copy(chosenText(answer)), quiet("copy-answer")));
    }
    // A failure has a button of its own to try again.
    if (answer.state !== "failed") {
      const options = { ...quiet("regenerate"), "data-idle": true };
      buttons.push(button("Regenerate", this._actions.regenerate, options));
    }
    if (answer.choices.some(({ tokens }) => tokens.length)) {
      const options = { ...quiet("tokens"), "aria-pressed": String(this._showsTokens) };
      buttons.push(button("Tokens", this._actions.showTokens, options));
    }
    return buttons;
  }

  /** Why answers ended, where it was not by themselves. */
  _endings() {
    const { choices, usage, state, dropped } = this._answer;
    const notes = [];
    if (dropped) {
      const turns = dropped === 1 ? "turn was" : `${dropped} turns were`;
      notes.push(`The oldest ${turns} left out, because the context is full.`);
    }
    if (state === "stopped") notes.push("Stopped.");
    const isFull = choices.length === 1 && usage?.total_tokens >= this._context;
    choices.forEach(({ finish }, index) => {
      const which = choices.length > 1 ? `Answer ${index + 1}` : "The answer";
      if (finish === "length") {
        notes.push(`${which} was cut off: ${isFull ? "the context is full" : "it has the most tokens that it may have"}.`);
      }
      if (finish === "content_filter") {
        notes.push(`${which} was prevented by a rule of the service. The model is not told of this turn later.`);
      }
    });
    return notes.map((note) => element("p", { class: "note" }, note));
  }

  _failure() {
    const { failure, state } = this._answer;
    if (state !== "failed" || !failure) return [];
    this._failureBox ??= failureBox(failure, this._actions.regenerate, `${this._key}-retry`);
    return [this._failureBox];
  }
}

/** A failure with its reason, and a button that becomes usable when the service allows it. */
export function failureBox(failure, retry, key) {
  const again = button("Try again", retry, { key, class: "primary" });
  const box = element(
    "div",
    { class: "failure", role: "alert" },
    element("p", {}, element("b", {}, failure.title)),
    failure.detail ? element("p", { class: "detail" }, failure.detail) : null,
    again,
  );
  const countDown = () => {
    const seconds = Math.ceil(((failure.retryAt ?? 0) - Date.now()) / 1000);
    again.disabled = seconds > 0;
    again.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
    if (seconds > 0) setTimeout(countDown, 1000);
  };
  countDown();
  return box;
}

/** Paragraphs as they are written, and code between fences. */
function blocks(text) {
  const found = [];
  let end = 0;
  const addProse = (part) => {
    const trimmed = part.replace(/^\n+|\n+$/g, "");
    if (trimmed) found.push(element("p", {}, trimmed));
  };
  for (const match of text.matchAll(FENCE)) {
    addProse(text.slice(end, match.index));
    found.push(element("pre", { tabindex: "0", "aria-label": "Code" }, element("code", {}, match[1])));
    end = match.index + match[0].length;
  }
  addProse(text.slice(end));
  return found;
}

/** Replaces the children that differ alone, so that a selection in the others stays. */
function replaceChanged(parent, children) {
  children.forEach((child, index) => {
    const shown = parent.children[index];
    if (!shown) parent.append(child);
    else if (!shown.isEqualNode(child)) shown.replaceWith(child);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

/** Usage and timings in one line. */
function figures({ usage, timing, state, choices }) {
  if (!usage) return state === "running" ? "waiting for the first token …" : "";
  const { cached_tokens: cached } = usage.prompt_tokens_details ?? {};
  const each = choices.length > 1 ? ` in ${choices.length} answers` : "";
  return [
    `${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}`,
    `${usage.completion_tokens} answer tokens${each}`,
    timing.first === null ? null : `first after ${milliseconds(timing.first)}`,
    timing.rate === null ? null : `${timing.rate.toFixed(timing.rate < 10 ? 1 : 0)} tokens/s`,
    `${(timing.total / 1000).toFixed(2)} s`,
  ].filter(Boolean).join(" · ");
}

function milliseconds(value) {
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(2)} s`;
}
