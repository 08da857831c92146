// The tokens of an answer, each coloured by its probability, with the alternatives beside it.

import { byId, element } from "./dom.js";

// The least probabilities of the shades, from the surest.
const SHADES = [0.9, 0.6, 0.3, 0.1, 0];
const HIDE_DELAY = 150;

/** The explanation of the shades. */
export function legend() {
  const names = ["≥ 90 %", "60–90 %", "30–60 %", "10–30 %", "< 10 %"];
  return element(
    "p",
    { class: "legend" },
    "Probability ",
    ...names.map((name, shade) => element("span", { class: `token shade-${shade}` }, name)),
    " Point at a token, or move with the arrow keys.",
  );
}

/** The tokens of one choice; `update` adds those that have come since. */
export class TokenView {
  constructor(choice, label) {
    this._choice = choice;
    this._shown = 0;
    this.element = element("div", {
      class: "tokens",
      role: "group",
      "aria-label": `${label}: its tokens`,
      onpointerover: (event) => this._on(event.target, showDetails),
      onpointerout: hideSoon,
      onfocusin: (event) => this._on(event.target, showDetails),
      onfocusout: hideSoon,
      onkeydown: (event) => this._move(event),
    });
    this.update();
  }

  update() {
    const { tokens } = this._choice;
    for (; this._shown < tokens.length; this._shown += 1) {
      const token = tokens[this._shown];
      const { space, text } = shownParts(token);
      const made = element(
        "span",
        {
          class: `token shade-${shade(token)}`,
          role: "button",
          // One stop for the tab key; the arrow keys go on from there.
          tabindex: this._shown === 0 ? "0" : "-1",
          "aria-label": `${spoken(token)}, ${percent(token)}`,
          "aria-describedby": "token-details",
          "data-index": this._shown,
        },
        text,
      );
      this.element.append(space, made);
    }
  }

  _on(target, act) {
    const span = target.closest?.("[data-index]");
    if (span) act(span, this._choice.tokens[span.dataset.index]);
  }

  _move(event) {
    const spans = [...this.element.children];
    const at = spans.indexOf(document.activeElement);
    const goals = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 };
    if (event.key === "Escape" && !byId("token-details").hidden) {
      hideDetails();
      event.stopPropagation();
    }
    const goal = spans[goals[event.key]];
    if (!goal) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    goal.tabIndex = 0;
    goal.focus();
  }
}

let hiding = 0;
document.addEventListener("scroll", () => hideDetails(), { passive: true });

function showDetails(span, token) {
  clearTimeout(hiding);
  const details = byId("token-details");
  const isListed = token.top_logprobs.some(({ logprob, token: text }) => text === token.token && logprob === token.logprob);
  const rows = isListed ? token.top_logprobs : [token, ...token.top_logprobs];
  details.replaceChildren(
    element("p", {}, element("b", {}, percent(token)), ` · logprob ${token.logprob.toFixed(3)}`),
    element("table", {}, element("tbody", {}, ...rows.map((row) => alternative(row, token)))),
  );
  details.hidden = false;
  place(details, span);
  // Pointing at the details keeps them.
  details.onpointerover = () => clearTimeout(hiding);
  details.onpointerout = hideSoon;
}

function alternative(row, token) {
  const bar = element("span", { class: "bar" });
  bar.style.width = `${Math.max(2, 100 * Math.exp(row.logprob))}%`;
  const isDrawn = row.token === token.token && row.logprob === token.logprob;
  return element(
    "tr",
    { class: isDrawn ? "drawn" : null },
    element("td", {}, visible(row).trimEnd() || "·"),
    element("td", { class: "number" }, percent(row)),
    element("td", { class: "number" }, row.logprob.toFixed(2)),
    element("td", { class: "bars" }, bar),
  );
}

/** Puts the details below the token, or above it where the window ends. */
function place(details, span) {
  const token = span.getClientRects()[0];
  const { width, height } = details.getBoundingClientRect();
  const left = Math.min(Math.max(8, token.left), document.documentElement.clientWidth - width - 8);
  const fits = token.bottom + height + 8 < window.innerHeight;
  details.style.left = `${left}px`;
  details.style.top = `${fits ? token.bottom + 2 : token.top - height - 2}px`;
}

function hideSoon() {
  clearTimeout(hiding);
  hiding = setTimeout(hideDetails, HIDE_DELAY);
}

export function hideDetails() {
  byId("token-details").hidden = true;
}

function shade(token) {
  const probability = Math.exp(token.logprob);
  return SHADES.findIndex((least) => probability >= least);
}

function percent(token) {
  const value = 100 * Math.exp(token.logprob);
  return `${value >= 9.995 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

/** A token as it is shown: white space can be seen, and so can bytes that are no character. */
function visible({ token, bytes }) {
  if (token.includes("\ufffd")) return bytes.map((byte) => `‹${byte.toString(16)}›`).join("");
  return token.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t") || "∅";
}

/** The space in front of a word, which gets no colour, and the rest of the token. */
function shownParts(token) {
  const text = visible(token);
  const word = text.trimStart();
  return word ? { space: text.slice(0, -word.length), text: word } : { space: "", text };
}

function spoken(token) {
  const text = visible(token).replaceAll("⏎\n", " line break ").trim();
  return text || "space";
}
