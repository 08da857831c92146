// The panels at the sides, and how far the page is scrolled.

import { byId } from "./dom.js";

const NAMES = ["settings", "dialogs"];
// Where a panel lies over the conversation; the style sheet has the same width.
const NARROW = matchMedia("(max-width: 60rem)");
const END_PIXELS = 120;

export class Sides {
  constructor() {
    this._focused = null; // what has the focus again when the panel is closed
    for (const name of NAMES) {
      byId(`toggle-${name}`).onclick = () => this.toggle(name);
      byId(`close-${name}`).onclick = () => this._set(name, false);
    }
    this._set("dialogs", !NARROW.matches, { movesFocus: false });
    NARROW.onchange = () => {
      for (const name of NAMES) this._set(name, name === "dialogs" && !NARROW.matches, { movesFocus: false });
    };
    byId("shade").onclick = () => this.closeTop();
  }

  /** Opens a panel where it has room beside the conversation; false if it has none. */
  openBeside(name) {
    if (!NARROW.matches && byId(name).hidden) this._set(name, true);
    return !NARROW.matches;
  }

  toggle(name) {
    this._set(name, byId(name).hidden);
  }

  /** Closes the panel that lies over the conversation, or the settings; false if there is none. */
  closeTop() {
    const open = NAMES.find((name) => !byId(name).hidden && (NARROW.matches || name === "settings"));
    if (open) this._set(open, false);
    return Boolean(open);
  }

  closeIfOver(name) {
    if (NARROW.matches && !byId(name).hidden) this._set(name, false);
  }

  isAtEnd() {
    const { scrollHeight, clientHeight, scrollTop } = document.scrollingElement;
    return scrollHeight - clientHeight - scrollTop < END_PIXELS;
  }

  scrollToEnd() {
    document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  }

  _set(name, isOpen, { movesFocus = true } = {}) {
    byId(name).hidden = !isOpen;
    byId(`toggle-${name}`).setAttribute("aria-expanded", String(isOpen));
    const isOver = NARROW.matches && NAMES.some((each) => !byId(each).hidden);
    byId("shade").hidden = !isOver;
    byId("middle").inert = isOver;
    if (!movesFocus) return;
    if (isOpen) {
      this._focused = document.activeElement;
      byId(name).querySelector("h2").focus();
    } else if (this._focused?.isConnected && this._focused !== document.body) {
      this._focused.focus();
    } else {
      byId(`toggle-${name}`).focus();
    }
  }
}
