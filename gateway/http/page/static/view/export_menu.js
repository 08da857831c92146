// The menu that saves the dialog as a file.

import { saveJson, saveMarkdown } from "../dialog/export.js";
import { byId } from "./dom.js";

export class ExportMenu {
  /** `dialog()` is the dialog to save. */
  constructor(dialog) {
    this._root = byId("export");
    const save = (write) => () => {
      write(dialog());
      this.close();
    };
    byId("export-json").onclick = save(saveJson);
    byId("export-markdown").onclick = save(saveMarkdown);
    document.addEventListener("click", (event) => {
      if (!this._root.contains(event.target)) this._root.open = false;
    });
  }

  setShown(isShown) {
    this._root.hidden = !isShown;
  }

  /** False if it is closed already. */
  close() {
    if (!this._root.open) return false;
    this._root.open = false;
    this._root.querySelector("summary").focus();
    return true;
  }
}
