"""The endless sequence of requests of a run, which depends only on the seed and the model.

Prompts are random token ids, whose length is exact without a tokenizer, or dialogs from a file.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

from chasqui.loadtest.lengths import Lengths
from client import requests
from client.errors import InvalidRequestError
from client.requests import ChatOptions, Dialog, Sampling, TextOptions
from client.results import Model
from llama.prompt_format.tags import special_tags
from llama.v1 import chat_pb2

# Ids below are unknown, beginning and end of sequence in Llama's vocabulary, not ordinary text.
FIRST_ORDINARY_ID = 3
SEEDS = 2**64
DIALOG_FORMS = '[{"role": …, "content": …}, …] or {"messages": […]}'


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests to send.

    With `dialogs`, these are sent in turn, and end of sequence ends an answer. Without, prompts are
    `prompt_tokens` random ids, of which the first `shared_prefix` are the same in all requests, and
    answers have exactly `answer_tokens`.
    """

    prompt_tokens: Lengths
    answer_tokens: Lengths
    shared_prefix: int
    dialogs: Sequence[Dialog]
    sampling: Sampling
    seed: int

    def __str__(self) -> str:
        answers = f"answers of {self.answer_tokens} tokens"
        if self.dialogs:
            return f"{len(self.dialogs):,} dialogs, {answers} or fewer"
        return f"prompts of {self.prompt_tokens} tokens, {answers}"


@dataclass(frozen=True, slots=True)
class Work:
    """One request; `shortened`: its drawn lengths were reduced to fit the context."""

    index: int
    request: chat_pb2.TextCompleteStreamRequest | chat_pb2.ChatCompleteStreamRequest
    shortened: bool = False


def work(workload: Workload, model: Model) -> Iterator[Work]:
    """The endless requests. InvalidRequestError: the sampling parameters cannot be sent."""
    if workload.dialogs:
        return _dialogs(workload, model)
    return _random_prompts(workload, model)


def read_dialogs(path: Path) -> list[Dialog]:
    """Dialogs from JSON lines: arrays of messages, or objects with such an array as `messages`.

    ValueError names the first line that is neither or cannot be sent. The gateway checks the rules
    of dialogs.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    dialogs = [_dialog(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not dialogs:
        raise ValueError(f"{path} contains no dialogs")
    return dialogs


def _random_prompts(workload: Workload, model: Model) -> Iterator[Work]:
    # Lengths and ids have separate generators, so that neither changes with the other.
    lengths, ids = _random(workload.seed, "lengths"), _random(workload.seed, "ids")
    ordinary = range(FIRST_ORDINARY_ID, model.vocab_size)
    prefix = _random(workload.seed, "prefix").choices(ordinary, k=workload.shared_prefix)
    index = 0
    while True:
        wanted = workload.prompt_tokens.draw(lengths), workload.answer_tokens.draw(lengths)
        prompt_tokens = _clip(wanted[0], model.context_length - 1)
        answer_tokens = _clip(wanted[1], model.context_length - prompt_tokens)
        # At least one token is not shared, or prompts of equal length would be equal.
        shared = prefix[: prompt_tokens - 1]
        prompt = shared + ids.choices(ordinary, k=prompt_tokens - len(shared))
        sampling = _sampling(workload, index, answer_tokens, ignore_eos=True)
        request = requests.text(
            chat_pb2.TextCompleteStreamRequest, [prompt], cast("TextOptions", sampling)
        )
        yield Work(index, request, shortened=wanted != (prompt_tokens, answer_tokens))
        index += 1


def _dialogs(workload: Workload, model: Model) -> Iterator[Work]:
    lengths = _random(workload.seed, "lengths")
    index = 0
    while True:
        for dialog in workload.dialogs:
            answer_tokens = _clip(workload.answer_tokens.draw(lengths), model.context_length)
            sampling = _sampling(workload, index, answer_tokens, ignore_eos=False)
            request = requests.chat(
                chat_pb2.ChatCompleteStreamRequest, [dialog], cast("ChatOptions", sampling)
            )
            yield Work(index, request)
            index += 1


def _random(seed: int, purpose: str) -> Random:
    return Random(f"{seed} {purpose}")


def _clip(tokens: int, most: int) -> int:
    return max(1, min(tokens, most))


def _sampling(workload: Workload, index: int, max_gen_len: int, *, ignore_eos: bool) -> Sampling:
    return {
        **workload.sampling,
        "max_gen_len": max_gen_len,
        "ignore_eos": ignore_eos,
        "seed": (workload.seed + index) % SEEDS,
    }


def _dialog(line: str, number: int) -> Dialog:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error
    messages = found.get("messages") if isinstance(found, dict) else found
    if not (isinstance(messages, list) and all(isinstance(each, dict) for each in messages)):
        raise ValueError(f"line {number} is not a dialog: it must be {DIALOG_FORMS}")
    try:
        requests.chat(chat_pb2.ChatCompleteStreamRequest, [messages], {})
    except InvalidRequestError as error:
        raise ValueError(f"line {number}: {error}") from error
    if tags := special_tags("\n".join(message["content"] for message in messages)):
        raise ValueError(
            f"line {number} contains {' and '.join(tags)}, so it would not be answered"
        )
    return cast("Dialog", messages)
