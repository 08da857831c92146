// The field for the next message, with the button that sends it or stops the answer.

import { byId } from "./dom.js";

export class Composer {
  /** `actions`: send, stop, editLast. */
  constructor(actions) {
    this._actions = actions;
    this._area = byId("message");
    this._button = byId("send");
    this._isRunning = false;
    this._area.addEventListener("input", () => this._fit());
    this._area.addEventListener("keydown", (event) => this._onKey(event));
    byId("composer").onsubmit = (event) => {
      event.preventDefault();
      this._submit();
    };
  }

  setRunning(isRunning) {
    this._isRunning = isRunning;
    this._button.textContent = isRunning ? "Stop" : "Send";
    this._button.classList.toggle("primary", !isRunning);
  }

  focus() {
    this._area.focus();
  }

  _submit() {
    if (this._isRunning) {
      this._actions.stop();
      return;
    }
    const text = this._area.value.trim();
    if (!text) return;
    this._area.value = "";
    this._fit();
    this._actions.send(text);
  }

  _onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!this._isRunning) this._submit();
    } else if (event.key === "ArrowUp" && !this._area.value) {
      event.preventDefault();
      this._actions.editLast();
    }
  }

  /** As high as its text; the style sheet has the bounds. */
  _fit() {
    this._area.style.height = "auto";
    this._area.style.height = `${this._area.scrollHeight + 2}px`;
  }
}
