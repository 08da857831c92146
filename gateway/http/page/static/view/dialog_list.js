// The list of the dialogs that are kept in this browser.

import { titleOf } from "../dialog/dialog.js";
import { button, byId, element, keepingFocus } from "./dom.js";

export class DialogList {
  /** `actions`: open, rename, remove; each gets the dialog first. */
  constructor(actions) {
    this._actions = actions;
    this._root = byId("dialog-list");
    this._renaming = null;
  }

  show(dialogs, current) {
    this._dialogs = dialogs;
    this._current = current;
    keepingFocus(() => this._root.replaceChildren(...dialogs.map((dialog) => this._entry(dialog))));
  }

  _entry(dialog) {
    if (dialog === this._renaming) return element("li", {}, this._editor(dialog));
    const title = titleOf(dialog);
    const isCurrent = dialog === this._current;
    const small = (name) => ({ class: "quiet", key: `${name}-${dialog.id}` });
    return element(
      "li",
      { class: isCurrent ? "current" : null },
      button(title, () => this._actions.open(dialog), {
        key: `open-${dialog.id}`,
        class: "open",
        title,
        "aria-current": isCurrent ? "true" : null,
      }),
      element(
        "span",
        { class: "entry-actions" },
        button("Rename", () => this._rename(dialog), {
          ...small("rename"),
          "aria-label": `Rename ${title}`,
        }),
        button("Delete", () => this._actions.remove(dialog), {
          ...small("delete"),
          "aria-label": `Delete ${title}`,
        }),
      ),
    );
  }

  _rename(dialog) {
    this._renaming = dialog;
    this.show(this._dialogs, this._current);
    const input = this._root.querySelector("input");
    input.focus();
    input.select();
  }

  _editor(dialog) {
    const input = element("input", { type: "text", maxlength: 200, "aria-label": "Title" });
    input.value = titleOf(dialog);
    const leave = (isKept) => {
      if (this._renaming !== dialog) return; // Enter and Escape move the focus, too
      this._renaming = null;
      if (isKept && input.value.trim() !== titleOf(dialog)) {
        this._actions.rename(dialog, input.value.trim());
      }
      this.show(this._dialogs, this._current);
      this._root.querySelector(`[data-key="rename-${dialog.id}"]`)?.focus();
    };
    input.addEventListener("blur", () => leave(true));
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      leave(event.key === "Enter");
    });
    return input;
  }
}
