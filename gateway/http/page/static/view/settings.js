// The panel with the system prompt and the sampling, which belong to a dialog.

import { DEFAULT_ALTERNATIVES } from "../service/generation.js";
import { byId, element } from "./dom.js";

// Each field: its name in the API, its label, the attributes of its input, and what it does.
const ANSWERS = [
  ["n", "Number", { min: 1, step: 1 }, "side by side"],
  ["max_tokens", "Most tokens", { min: 0, step: 1 }, "of each answer"],
  ["seed", "Seed", { text: true }, "a whole number, to get the same answer again"],
  ["top_logprobs", "Alternatives", { min: 0, max: 20, step: 1 }, "of each token, in the token view"],
];
const SAMPLING = [
  ["temperature", "Temperature", { min: 0, max: 100, step: 0.1 }, "0: always the most probable token"],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.05 }, "keeps the most probable tokens, up to this sum"],
  ["top_k", "Top k", { min: 1, step: 1 }, "keeps so many of the most probable tokens"],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }, "drops what is below this share of the most probable"],
];
const PENALTIES = [
  ["presence_penalty", "Presence", { min: -2, max: 2, step: 0.1 }, "for tokens in the answer"],
  ["frequency_penalty", "Frequency", { min: -2, max: 2, step: 0.1 }, "for each time in the answer"],
  ["repetition_penalty", "Repetition", { min: 0.1, max: 10, step: 0.05 }, "for tokens in prompt and answer"],
];

export class SettingsPanel {
  /** `onChange` is called after each change of a setting, which is in the dialog then. */
  constructor(onChange) {
    this._settings = {};
    this._fields = new Map();
    this._onChange = onChange;
    const area = (rows) => element("textarea", { rows });
    const numbers = (fields) =>
      fields.map(([name, label, attributes, help]) => this._add(name, label, numberInput(attributes), help));
    byId("settings-fields").append(
      this._add("system", "System prompt", area(4), "tells the model how to answer"),
      this._add(
        "logprobs",
        "Show token probabilities",
        element("input", { type: "checkbox" }),
        "of the next answers",
      ),
      group("Answers", numbers(ANSWERS)),
      group("Sampling", numbers(SAMPLING)),
      group("Penalties", numbers(PENALTIES)),
      this._add("stop", "Stop at", area(2), "texts at which an answer ends, one a line"),
    );
    this._fields.get("top_logprobs").placeholder = DEFAULT_ALTERNATIVES;
  }

  /** Shows a dialog's settings. */
  show(dialog) {
    this._settings = dialog.settings;
    for (const [name, input] of this._fields) {
      if (input.type === "checkbox") input.checked = Boolean(this._settings[name]);
      else input.value = this._settings[name] ?? "";
      input.removeAttribute("aria-invalid");
    }
  }

  /** Shows the service's defaults in empty fields. */
  showDefaults(model) {
    const defaults = { top_k: "off", seed: "random", n: 1, ...model.default_sampling };
    for (const [name, value] of Object.entries(defaults)) {
      const input = this._fields.get(name);
      if (input) input.placeholder = value;
    }
    this._fields.get("n").max = model.max_choices;
    this._fields.get("max_tokens").max = model.max_model_len;
  }

  /** Marks the field that the service refused, and returns it; null if it is none of these. */
  mark(name) {
    const input = this._fields.get(name?.split("[")[0]) ?? null;
    input?.setAttribute("aria-invalid", "true");
    return input;
  }

  _add(name, label, input, help) {
    const id = `setting-${name}`;
    input.id = id;
    input.setAttribute("aria-describedby", `${id}-help`);
    input.addEventListener("input", () => {
      this._settings[name] = input.type === "checkbox" ? input.checked : input.value;
      input.removeAttribute("aria-invalid");
      this._onChange(name);
    });
    this._fields.set(name, input);
    return element(
      "div",
      { class: `field ${input.type}` },
      element("label", { for: id }, label),
      input,
      element("small", { id: `${id}-help` }, help),
    );
  }
}

function numberInput({ text, ...attributes }) {
  if (text) return element("input", { type: "text", inputmode: "numeric", autocomplete: "off" });
  return element("input", { type: "number", inputmode: "decimal", ...attributes });
}

function group(title, fields) {
  return element("fieldset", {}, element("legend", {}, title), ...fields);
}
