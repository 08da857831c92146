// One request for answers to a turn: what is sent, and what becomes of the chunks.

import { messages, path } from "../dialog/dialog.js";
import { streamChat } from "./client.js";
import { described, ServiceError } from "./failures.js";

const NUMBERS = [
  "n",
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
];
// Tokens beside each token of the token view.
export const DEFAULT_ALTERNATIVES = 5;
// Above this share of the context, the oldest turns are left out, so that the answer has room.
const MAX_PROMPT_SHARE = 0.75;
// An estimate for texts whose tokens are not known; where it is wrong, the service refuses the prompt.
const CHARACTERS_PER_TOKEN = 4;

export class Generation {
  /** Fills `answer`, the one of `turn` in `dialog`; calls `onProgress` after each change. */
  constructor(dialog, turn, answer, model, onProgress) {
    this.dialog = dialog;
    this.turn = turn;
    this.answer = answer;
    this._model = model;
    this._onProgress = onProgress;
    this._aborter = new AbortController();
    this._firstTokens = 0;
    this._begun = performance.now();
  }

  /** Ends the request; the answer keeps its text so far. */
  stop() {
    this._aborter.abort();
  }

  /** Resolves when the answer is complete, was stopped or has failed. */
  async run() {
    const { answer } = this;
    this._dropTurns();
    try {
      while (!(await this._attempt()));
      answer.state = "done";
    } catch (error) {
      answer.state = error.name === "AbortError" ? "stopped" : "failed";
      if (answer.state === "failed") answer.failure = described(error);
    }
    this._measure();
    this._onProgress();
  }

  /** Sends the request; false if it has to be sent again with fewer turns. */
  async _attempt() {
    const sent = this._messages();
    this._begun = performance.now();
    try {
      for await (const chunk of streamChat(this._body(sent), this._aborter.signal)) {
        this._append(chunk);
        this._onProgress();
      }
      return true;
    } catch (error) {
      const tooLong = error instanceof ServiceError && /context length/.test(error.message);
      if (!tooLong || error.param?.split("[")[0] !== "messages" || !this._canDrop(sent)) throw error;
      this.answer.dropped += 1;
      return false;
    }
  }

  _messages() {
    const tags = this._model?.special_tags ?? [];
    return messages(this.dialog, this.turn, { dropped: this.answer.dropped, tags });
  }

  _canDrop(sent) {
    return sent.filter(({ role }) => role === "user").length > 1;
  }

  /** Leaves out the oldest turns of a prompt that would be too long, as far as lengths are known. */
  _dropTurns() {
    const earlier = path(this.dialog).filter(({ answer }) => answer?.usage).at(-1)?.answer;
    if (!earlier || !this._model) return;
    const { usage, choices, dropped } = earlier;
    this.answer.dropped = dropped;
    let sent = this._messages();
    let tokens = usage.prompt_tokens + usage.completion_tokens / choices.length;
    tokens += this.turn.text.length / CHARACTERS_PER_TOKEN;
    while (tokens > MAX_PROMPT_SHARE * this._model.max_model_len && this._canDrop(sent)) {
      this.answer.dropped += 1;
      const rest = this._messages();
      tokens -= (length(sent) - length(rest)) / CHARACTERS_PER_TOKEN;
      sent = rest;
    }
  }

  _body(sent) {
    const { settings } = this.dialog;
    const body = {
      messages: sent,
      stream: true,
      // In every chunk, so that a stopped answer has its usage, too.
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    for (const name of NUMBERS) {
      if (settings[name]) body[name] = Number(settings[name]);
    }
    const stop = (settings.stop ?? "").split("\n").filter(Boolean);
    if (stop.length) body.stop = stop;
    if (settings.logprobs) {
      body.logprobs = true;
      body.top_logprobs = Number(settings.top_logprobs || DEFAULT_ALTERNATIVES);
    }
    const json = JSON.stringify(body);
    // A seed has 64 bits, more than a number here can hold, so it is put in as text.
    const seed = (settings.seed ?? "").trim();
    return /^-?\d+$/.test(seed) ? `${json.slice(0, -1)},"seed":${BigInt(seed)}}` : json;
  }

  _append(chunk) {
    const { answer } = this;
    answer.model = chunk.model ?? answer.model;
    answer.usage = chunk.usage ?? answer.usage;
    for (const { index, delta, logprobs, finish_reason: finish } of chunk.choices) {
      const choice = answer.choices[index];
      choice.text += delta.content ?? "";
      choice.tokens.push(...(logprobs?.content ?? []));
      choice.finish = finish ?? choice.finish;
      if (delta.content && answer.timing.first === null) {
        answer.timing.first = performance.now() - this._begun;
        this._firstTokens = chunk.usage?.completion_tokens ?? 0;
      }
    }
    if (chunk.choices.length) this._measure();
  }

  /** Notes the time so far, and the rate of the tokens behind the first ones. */
  _measure() {
    const { timing, usage } = this.answer;
    timing.total = performance.now() - this._begun;
    const tokens = (usage?.completion_tokens ?? 0) - this._firstTokens;
    const seconds = (timing.total - timing.first) / 1000;
    timing.rate = timing.first !== null && tokens > 0 && seconds > 0 ? tokens / seconds : null;
  }
}

function length(sent) {
  return sent.reduce((sum, { content }) => sum + content.length, 0);
}
