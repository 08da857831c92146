// A dialog as a file.

import { continues, messages, path, titleOf } from "./dialog.js";

/** JSON: the messages as OpenAI's API has them, and everything that the page knows. */
export function saveJson(dialog) {
  const last = path(dialog).at(-1);
  const sent = last ? messages(dialog, last.turn) : [];
  if (continues(last?.answer)) {
    const { text } = last.answer.choices[last.answer.chosen];
    sent.push({ role: "assistant", content: text });
  }
  const content = JSON.stringify({ title: titleOf(dialog), messages: sent, dialog }, null, 2);
  save(dialog, "json", "application/json", content);
}

/** Markdown: the turns that are shown, with all of several answers. */
export function saveMarkdown(dialog) {
  const parts = [`# ${titleOf(dialog)}`];
  const system = dialog.settings.system?.trim();
  if (system) parts.push("## System prompt", system);
  for (const { turn, answer } of path(dialog)) {
    parts.push("## User", turn.text);
    answer?.choices.forEach((choice, index) => {
      const number = answer.choices.length > 1 ? ` ${index + 1}` : "";
      const chosen = number && index === answer.chosen ? ", continued" : "";
      parts.push(`## Assistant${number}${chosen}`, choice.text);
    });
  }
  save(dialog, "md", "text/markdown", `${parts.join("\n\n")}\n`);
}

function save(dialog, ending, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = document.createElement("a");
  const name = titleOf(dialog).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").toLowerCase();
  link.href = url;
  link.download = `${name || "dialog"}.${ending}`;
  link.click();
  // The download has begun by then, and the browser holds the content itself.
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
