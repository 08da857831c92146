// The dialog as it is read: turns one below the other, each with its answers.

import { continues, path } from "../dialog/dialog.js";
import { AnswersView } from "./answers.js";
import { button, byId, copy, element, keepingFocus } from "./dom.js";
import { hideDetails } from "./tokens.js";

export class Transcript {
  /** `actions`: edit, regenerate, select, choose; each gets the turn first. */
  constructor(actions) {
    this._actions = actions;
    this._root = byId("transcript");
    this._dialog = null;
    this._model = null;
    this._views = new Map();
    this._asText = new WeakSet(); // answers whose tokens are not shown
    this._editing = null;
    this._isBusy = false;
  }

  /** While an answer is made, nothing else can be asked or chosen. */
  setBusy(isBusy) {
    this._isBusy = isBusy;
    if (isBusy) this._editing = null;
    for (const each of this._root.querySelectorAll("[data-idle]")) each.disabled = isBusy;
  }

  show(dialog, model) {
    if (dialog !== this._dialog) this._editing = null;
    this._dialog = dialog;
    this._model = model;
    keepingFocus(() => this._draw());
  }

  /** Shows what an answer has become, if it is in view. */
  update(answer) {
    const view = this._views.get(answer);
    const needsTokens = answer.choices.some(({ tokens }) => tokens.length);
    // The first token decides how the answer is shown.
    if (needsTokens && view && !view.hadTokens) keepingFocus(() => this._draw());
    else view?.update();
  }

  edit(turn) {
    this._editing = turn;
    this._draw();
    const area = this._root.querySelector(".edit textarea");
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  toggleTokens(answer) {
    if (!this._asText.delete(answer)) this._asText.add(answer);
    keepingFocus(() => this._draw());
  }

  _draw() {
    hideDetails();
    this._views.clear();
    const steps = path(this._dialog);
    byId("welcome").hidden = steps.length > 0;
    const system = this._dialog.settings.system?.trim();
    this._root.replaceChildren(
      ...(system && steps.length ? [systemPrompt(system)] : []),
      ...steps.flatMap((step, index) => this._turn(step, index)),
    );
    if (this._isBusy) this.setBusy(true);
  }

  _turn({ owner, turn, answer }, index) {
    const parts = [turn === this._editing ? this._editor(turn) : this._message(owner, turn, index)];
    if (answer) {
      const view = new AnswersView(answer, {
        key: `answer-${index}`,
        showsTokens: !this._asText.has(answer),
        context: this._model?.max_model_len ?? Infinity,
        actions: {
          regenerate: () => this._actions.regenerate(turn),
          choose: (choice) => this._actions.choose(answer, choice),
          showTokens: () => this.toggleTokens(answer),
        },
      });
      view.hadTokens = answer.choices.some(({ tokens }) => tokens.length);
      this._views.set(answer, view);
      const pages = pager("answer", `answer-${index}`, turn.answers, turn, this._actions.select);
      if (pages) view.element.lastChild.prepend(pages);
      if (!continues(answer)) view.element.classList.add("apart");
      parts.push(view.element);
    }
    return parts;
  }

  _message(owner, turn, index) {
    const quiet = (name) => ({ class: "quiet", key: `turn-${index}-${name}` });
    const pages = pager("message", `turn-${index}`, owner.turns, owner, this._actions.select);
    const actions = element(
      "div",
      { class: "actions" },
      pages,
      button("Edit", () => this.edit(turn), {
        ...quiet("edit"),
        "aria-label": "Edit this message",
        "data-idle": true,
      }),
      button("Copy", () => copy(turn.text), { ...quiet("copy"), "aria-label": "Copy this message" }),
    );
    const message = element("p", {}, turn.text);
    return element("article", { class: "user", "aria-label": "Your message" }, message, actions);
  }

  _editor(turn) {
    const area = element("textarea", { rows: 3, "aria-label": "Edited message" });
    area.value = turn.text;
    const leave = () => {
      this._editing = null;
      this._draw();
      byId("message").focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (!text) return;
      this._editing = null;
      byId("message").focus();
      this._actions.edit(turn, text);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    const buttons = [button("Send", send, { class: "primary" }), button("Cancel", leave)];
    return element("div", { class: "edit" }, area, element("div", { class: "actions" }, ...buttons));
  }
}

/** Goes through the versions of a message or an answer; null if there is one. */
function pager(name, key, versions, holder, select) {
  if (versions.length < 2) return null;
  const go = (step, label, text) => {
    const isThere = Boolean(versions[holder.selected + step]);
    return button(text, () => select(holder, holder.selected + step), {
      key: `${key}-page${step}`,
      class: "quiet",
      "aria-label": `${label} ${name}`,
      disabled: !isThere,
      "data-idle": isThere,
    });
  };
  const place = element("span", { class: "place" }, `${holder.selected + 1} / ${versions.length}`);
  const parts = [go(-1, "Earlier", "‹"), place, go(1, "Later", "›")];
  return element("span", { class: "pager", role: "group", "aria-label": `Versions of the ${name}` }, ...parts);
}

function systemPrompt(text) {
  return element(
    "details",
    { class: "system" },
    element("summary", {}, "System prompt"),
    element("p", {}, text),
  );
}
