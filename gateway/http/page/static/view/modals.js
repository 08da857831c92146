// The windows in front of the page: the API key, a question, the shortcuts.

import { byId } from "./dom.js";

/** Asks for the API key until one is given; `reason` says why. */
export function askForKey(reason) {
  const input = byId("api-key");
  byId("key-reason").textContent = reason;
  return answered("key-dialog", () => {
    const key = input.value.trim();
    input.value = "";
    return key;
  });
}

/** Asks whether to do something; true if so. */
export function confirmed(question, action) {
  byId("confirm-question").textContent = question;
  byId("confirm-yes").textContent = action;
  return answered("confirm-dialog", () => true);
}

export function showHelp() {
  return answered("help-dialog", () => true);
}

/** Opens a window; resolves to `read()` if its form was sent, else to null. */
function answered(id, read) {
  const modal = byId(id);
  if (modal.open) return Promise.resolve(null);
  return new Promise((resolve) => {
    let value = null;
    modal.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      value = read();
      modal.close();
    };
    for (const each of modal.querySelectorAll("[data-cancel]")) each.onclick = () => modal.close();
    modal.onclose = () => resolve(value);
    modal.showModal();
  });
}
