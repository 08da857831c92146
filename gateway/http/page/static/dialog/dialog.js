// A dialog as a tree: a turn is a user's message with its answers, and each of the answers has the
// turns that continue it. Edited messages and regenerated answers stand beside the earlier ones, so
// nothing is lost. `selected` says which of them is shown.

export function newDialog(settings) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings, turns: [], selected: 0 };
}

/** Adds a turn behind `owner`, a dialog or one of its answers, and selects it. */
export function addTurn(owner, text) {
  const turn = { text, answers: [], selected: 0 };
  owner.selected = owner.turns.push(turn) - 1;
  return turn;
}

/** Adds an answer of `n` empty choices to a turn and selects it, in place of those without a text. */
export function addAnswer(turn, n) {
  turn.answers = turn.answers.filter(({ choices, turns }) => turns.length || choices.some(({ text }) => text));
  const answer = {
    state: "running", // then done, stopped or failed
    choices: Array.from({ length: n }, () => ({ text: "", tokens: [], finish: null })),
    chosen: 0,
    usage: null,
    timing: { started: Date.now(), first: null, rate: null, total: null },
    dropped: 0, // oldest turns that were not sent
    failure: null,
    model: null,
    turns: [],
    selected: 0,
  };
  turn.selected = turn.answers.push(answer) - 1;
  return answer;
}

/** The selected turns from the first to the last, each with its owner and its selected answer. */
export function path(dialog) {
  const steps = [];
  for (let owner = dialog; owner?.turns.length; owner = steps.at(-1).answer) {
    const turn = owner.turns[owner.selected];
    steps.push({ owner, turn, answer: turn.answers[turn.selected] ?? null });
  }
  return steps;
}

export const chosenText = (answer) => answer?.choices[answer.chosen].text ?? "";

/** Whether the model is told of an answer later: not of one that is empty or was refused. */
export function continues(answer) {
  return Boolean(answer && chosenText(answer) && answer.choices[answer.chosen].finish !== "content_filter");
}

/** The messages before the end of the path to `last`, a turn, without the oldest `dropped` turns. */
export function messages(dialog, last, { dropped = 0, tags = [] } = {}) {
  const steps = path(dialog);
  const index = steps.findIndex(({ turn }) => turn === last);
  const earlier = steps.slice(0, index).filter(({ answer }) => continues(answer));
  const system = dialog.settings.system?.trim();
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...earlier.slice(dropped).flatMap(({ turn, answer }) => [
      { role: "user", content: turn.text },
      { role: "assistant", content: withoutTags(chosenText(answer), tags) },
    ]),
    { role: "user", content: last.text },
  ];
}

export function titleOf(dialog) {
  const first = dialog.turns[dialog.selected]?.text ?? "";
  const line = first.trim().split("\n")[0];
  return dialog.title || (line.length > 60 ? `${line.slice(0, 59)}…` : line) || "New dialog";
}

/** A text without the tags for which the service would refuse the dialog. */
function withoutTags(text, tags) {
  // Again until there is none, because the rest may have become a tag.
  for (let found; (found = tags.find((tag) => text.includes(tag))); ) {
    text = text.replaceAll(found, "");
  }
  return text;
}

/** A random id. Unlike crypto.randomUUID, this exists on pages without TLS, too. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
