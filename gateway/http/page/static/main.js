// The chat page: connects the dialogs, the service and the views.

import { addAnswer, addTurn, newDialog, path, titleOf } from "./dialog/dialog.js";
import * as storage from "./dialog/storage.js";
import { getModel, setApiKey } from "./service/client.js";
import { described } from "./service/failures.js";
import { Generation } from "./service/generation.js";
import { failureBox } from "./view/answers.js";
import { Composer } from "./view/composer.js";
import { DialogList } from "./view/dialog_list.js";
import { announce, byId, copy, keepingFocus, notify, oncePerFrame } from "./view/dom.js";
import { ExportMenu } from "./view/export_menu.js";
import { askForKey, confirmed, showHelp } from "./view/modals.js";
import { onShortcuts } from "./view/shortcuts.js";
import { SettingsPanel } from "./view/settings.js";
import { Sides } from "./view/sides.js";
import { Transcript } from "./view/transcript.js";

// Milliseconds between two saves of an answer that is being made.
const SAVE_INTERVAL = 1000;
// Seconds until the model is asked for again, where the service does not say.
const RETRY_SECONDS = 3;

let dialogs = [];
let current = newDialog({});
let model = null;
let generation = null;

const sides = new Sides();
const transcript = new Transcript({
  edit: (turn, text) => ask(path(current).find((step) => step.turn === turn).owner, text),
  regenerate: (turn) => generate(turn),
  select: (holder, index) => change(() => (holder.selected = index)),
  choose: (answer, index) => change(() => (answer.chosen = index)),
});
const settings = new SettingsPanel((name) => {
  if (name === "system") transcript.show(current, model);
  keep(current);
});
const dialogList = new DialogList({
  open: (dialog) => {
    show(dialog);
    sides.closeIfOver("dialogs");
  },
  rename: (dialog, title) => {
    dialog.title = title;
    keep(dialog);
    show(current);
  },
  remove,
});
const composer = new Composer({
  send: (text) => ask(path(current).at(-1)?.answer ?? current, text),
  stop: () => generation?.stop(),
  editLast: () => {
    const last = path(current).at(-1);
    if (last && !generation) transcript.edit(last.turn);
  },
});

const exportMenu = new ExportMenu(() => current);

/** Adds a message behind `owner`, and has it answered. */
function ask(owner, text) {
  if (generation) return;
  const isNew = !dialogs.includes(current);
  const turn = addTurn(owner, text);
  if (isNew) dialogs.unshift(current);
  generate(turn);
}

/** Has a turn answered, beside the answers that it has. */
async function generate(turn) {
  if (generation) return;
  const dialog = current;
  const answer = addAnswer(turn, choices(dialog));
  const draw = oncePerFrame(() => {
    if (current !== dialog) return;
    const isAtEnd = sides.isAtEnd();
    transcript.update(answer);
    if (isAtEnd) sides.scrollToEnd();
  });
  let saved = Date.now();
  generation = new Generation(dialog, turn, answer, model, () => {
    draw();
    if (Date.now() - saved < SAVE_INTERVAL) return;
    saved = Date.now();
    keep(dialog);
  });
  setRunning(true);
  dialog.updated = Date.now();
  dialogs.sort((a, b) => b.updated - a.updated);
  show(dialog);
  keep(dialog);
  sides.scrollToEnd();
  announce("Answering");
  await generation.run();
  generation = null;
  setRunning(false);
  keep(dialog);
  announce(outcome(answer));
  if (answer.failure) onFailure(answer.failure, () => current === dialog && generate(turn));
}

/** How many answers to expect; the service refuses other numbers. */
function choices(dialog) {
  const most = model?.max_choices ?? 64;
  return Math.min(Math.max(1, Math.floor(Number(dialog.settings.n) || 1)), most);
}

function setRunning(isRunning) {
  composer.setRunning(isRunning);
  transcript.setBusy(isRunning);
}

function outcome(answer) {
  if (answer.failure) return ""; // an alert tells it
  const text = answer.choices.map((choice) => choice.text).join("\n");
  return answer.state === "stopped" ? `Stopped. ${text}` : text;
}

async function onFailure(failure, again) {
  if (failure.status === 401) {
    if (await connect(failure.detail)) again();
    return;
  }
  const field = settings.mark(failure.param);
  if (field && sides.openBeside("settings")) field.focus();
}

/** Gets the model. Without a key that the service knows it asks for one first: false if none came. */
async function connect(reason = null) {
  if (reason !== null) {
    const key = await askForKey(reason);
    if (key === null) return false;
    setApiKey(key);
  }
  byId("banner").replaceChildren();
  clearTimeout(onUnavailable.timer);
  try {
    model = await getModel();
  } catch (error) {
    return onUnavailable(described(error));
  }
  byId("model").textContent = `${model.id} · ${model.max_model_len} tokens`;
  settings.showDefaults(model);
  transcript.show(current, model);
  return true;
}

function onUnavailable(failure) {
  if (failure.status === 401) return connect(failure.detail);
  byId("banner").replaceChildren(failureBox(failure, () => connect(), "connect"));
  if (failure.status === 503 || failure.status === undefined) {
    const wait = failure.retryAt ? failure.retryAt - Date.now() : 0;
    onUnavailable.timer = setTimeout(connect, Math.max(wait, 1000 * RETRY_SECONDS));
  }
  return false;
}

function change(make) {
  if (generation?.dialog === current) return;
  make();
  keep(current);
  transcript.show(current, model);
}

function show(dialog) {
  current = dialog;
  document.title = `${titleOf(dialog)} · Chasqui`;
  byId("title").textContent = titleOf(dialog);
  exportMenu.setShown(dialog.turns.length > 0);
  settings.show(dialog);
  transcript.show(dialog, model);
  dialogList.show(dialogs, dialog);
}

/** Begins a dialog with the settings of the current one. */
function begin() {
  show(newDialog({ ...current.settings }));
  sides.closeIfOver("dialogs");
  composer.focus();
}

async function remove(dialog) {
  if (!(await confirmed(`Delete “${titleOf(dialog)}”? It is kept nowhere else.`, "Delete"))) return;
  if (generation?.dialog === dialog) generation.stop();
  dialogs = dialogs.filter((each) => each !== dialog);
  storage.remove(dialog);
  if (dialog === current) show(dialogs[0] ?? newDialog({ ...current.settings }));
  else dialogList.show(dialogs, current);
  notify("Deleted");
  composer.focus();
}

async function keep(dialog) {
  if (!dialogs.includes(dialog)) return;
  try {
    await storage.save(dialog);
  } catch (error) {
    notify(`This dialog could not be kept: ${error.message}`);
  }
}

function lastAnswer() {
  return path(current).at(-1)?.answer ?? null;
}

onShortcuts({
  "new": begin,
  "regenerate": () => path(current).length && generate(path(current).at(-1).turn),
  "edit": () => path(current).length && !generation && transcript.edit(path(current).at(-1).turn),
  "copy": () => lastAnswer() && copy(lastAnswer().choices[lastAnswer().chosen].text),
  "tokens": () => lastAnswer() && transcript.toggleTokens(lastAnswer()),
  "dialogs": () => sides.toggle("dialogs"),
  "settings": () => sides.toggle("settings"),
  "message": () => composer.focus(),
  "help": showHelp,
  "escape": () => exportMenu.close() || sides.closeTop() || generation?.stop(),
});
byId("base-url").textContent = new URL("v1", location.href).href;
byId("new").onclick = begin;
byId("help").onclick = showHelp;

addEventListener("pagehide", () => generation && keep(generation.dialog));

const kept = await storage.load();
if (kept === null) notify("This browser keeps no data here: the dialogs end with the page.");
dialogs = kept ?? [];
for (const dialog of dialogs) interrupted(dialog);
keepingFocus(() => show(dialogs[0] ?? current));
composer.focus();
connect();

/** Marks the answers that a reload has cut off. */
function interrupted(owner) {
  for (const turn of owner.turns) {
    for (const answer of turn.answers) {
      if (answer.state === "running") answer.state = "stopped";
      interrupted(answer);
    }
  }
}
