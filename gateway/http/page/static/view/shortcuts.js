// The keyboard's shortcuts; the help lists them. All but Escape are with Alt, so none gets in the way
// of typing.

// By the place of the key: with Alt, some layouts make another character of it.
const CODES = {
  KeyN: "new",
  KeyR: "regenerate",
  KeyE: "edit",
  KeyC: "copy",
  KeyT: "tokens",
  KeyL: "dialogs",
  KeyS: "settings",
  KeyM: "message",
  KeyH: "help",
};

/** Calls the action of a shortcut; `actions` has one for each name. */
export function onShortcuts(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return; // Escape is theirs
    if (event.key === "Escape") {
      actions.escape();
      return;
    }
    const name = CODES[event.code];
    if (!name || !event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    actions[name]();
  });
}
