// Elements of the page. Texts become text nodes, never HTML.

/**
 * Makes an element. `properties` are attributes; names that begin with "on" are event handlers,
 * and values that are null, undefined or false are left out.
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Makes a button. `key` names it, so that it has the focus again after the view is drawn anew. */
export function button(label, onclick, properties = {}) {
  const { key, ...others } = properties;
  return element("button", { type: "button", onclick, "data-key": key, ...others }, label);
}

export const byId = (id) => document.getElementById(id);

/** Draws with `draw` and returns the focus to the element with the same key. */
export function keepingFocus(draw) {
  const key = document.activeElement?.dataset?.key;
  draw();
  if (key) document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

/** Calls `draw` once before the next frame, however often it is asked. */
export function oncePerFrame(draw) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}

/** Tells users of screen readers something that others see. */
export function announce(text) {
  byId("announcement").textContent = text;
}

/** Shows a short note for some seconds, with a button if it names an action. */
export function notify(text, action = null) {
  const note = byId("note");
  const hide = () => note.replaceChildren();
  clearTimeout(notify.timer);
  note.replaceChildren(element("span", {}, text));
  if (action) {
    note.append(
      button(action.label, () => {
        hide();
        action.run();
      }),
    );
  }
  notify.timer = setTimeout(hide, action ? 10_000 : 3_000);
}

/** Copies a text to the clipboard. Pages without TLS have only the older way. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { readonly: true, "aria-hidden": "true" });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused?.focus();
  }
  notify("Copied");
}
