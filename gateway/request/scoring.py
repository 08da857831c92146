"""Score requests: their rules, and the prompts by which the model scores the candidates.

A candidate is encoded together with its prompt, as one text, because a token may stand for the end
of the prompt and the beginning of the candidate. All candidates are scored from the same token on:
the first one in which these texts, or the prompt alone, differ. So their logprobs are those of
continuations of the same tokens, and can be compared.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gateway.request.draft import Prompt
from gateway.request.options import RequestLimits
from gateway.request.read_dialogs import Dialogs, read_dialog
from gateway.request.turn_dropper import Encode
from gateway.request.validation import priority_violations
from gateway.request.window import Window
from gateway.text.detokenizer import text_of
from gateway.text.vocabulary import Vocabulary
from llama.prompt_format.dialog import ASSISTANT, Message, Segment
from llama.prompt_format.formats import PromptFormat
from llama.v1 import chat_pb2
from serving.errors import Violation, invalid_argument
from serving.request_rules import (
    count_violations,
    logprob_token_ids_violations,
    token_id_violations,
    too_long,
    top_logprobs_violations,
)

# The most bytes of a request's texts, each candidate joined to its prompt.
MAX_JOINED_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Scoring:
    """A Score request without violations, and without the message, which can have megabytes.

    One of `segments` and `prompt_ids` is the prompt, one of `texts` and `ids` are the candidates.
    """

    prompt_field: str
    segments: list[Segment] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    before: str = ""  # between the last segment's text and a candidate's
    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    dialog: list[Message] = field(default_factory=list)  # if the prompt is one

    @property
    def candidates(self) -> int:
        """The number of candidates."""
        return len(self.texts) + len(self.ids)

    def path(self, index: int) -> str:
        """The field path of a candidate."""
        return f"candidates[{index}]" if self.texts else f"candidate_ids[{index}]"

    @property
    def joined(self) -> list[Segment]:
        """The last segment of the prompt, joined to each of the candidates' texts."""
        last = self.segments[-1]
        return [replace(last, text=last.text + self.before + text) for text in self.texts]

    def subjects(
        self, prompts: Sequence[Prompt], vocabulary: Vocabulary
    ) -> list[str | list[Message]]:
        """For each candidate the text or the dialog that a safety classifier judges."""
        if self.dialog:
            answers = self.texts or [text_of(each, vocabulary) for each in self.ids]
            return [[*self.dialog, Message(ASSISTANT, answer)] for answer in answers]
        if self.texts:
            return [segment.text for segment in self.joined]
        return [text_of(each.ids, vocabulary) for each in prompts]


def read_scoring(
    request: chat_pb2.ScoreRequest,
    limits: RequestLimits,
    vocab_size: int,
    window: Window,
    prompt_format: PromptFormat,
) -> Scoring:
    """The request, checked; INVALID_ARGUMENT with all of its violations."""
    read = Dialogs()
    if request.HasField("dialog"):
        read_dialog("dialog", request.dialog, limits, prompt_format, into=read)
    violations = [
        *read.violations,
        *_special_tags_violations(read, prompt_format),
        *_prompt_violations(request, vocab_size, window),
        *_candidates_violations(request, limits, vocab_size, window),
        *top_logprobs_violations(request.top_logprobs),
        *logprob_token_ids_violations(request.logprob_token_ids, vocab_size),
        *priority_violations(request.priority, limits),
    ]
    if violations:
        raise invalid_argument(violations)
    texts, ids = [*request.candidates], [[*each.ids] for each in request.candidate_ids]
    match request.WhichOneof("context"):
        case "prompt":
            scoring = Scoring("prompt", [Segment(request.prompt, bos=True)], texts=texts, ids=ids)
        case "dialog":
            dialog = read.messages["dialog"]
            segments = [*itertools.chain.from_iterable(prompt_format.render(dialog))]
            before = prompt_format.before_answer
            scoring = Scoring("dialog", segments, [], before, texts, ids, dialog)
        case _:
            scoring = Scoring("prompt_ids", prompt_ids=[*request.prompt_ids.ids], ids=ids)
    if violations := [*_size_violations(scoring, window)]:
        raise invalid_argument(violations)
    return scoring


async def encode_candidates(scoring: Scoring, encode: Encode, window: Window) -> list[Prompt]:
    """For each candidate the prompt that scores it; INVALID_ARGUMENT if one cannot be scored."""
    if scoring.texts:
        encoded = await encode([*scoring.segments, *scoring.joined])
        first = len(scoring.segments) - 1  # the first segment in which the candidates may differ
        begin = [*itertools.chain.from_iterable(encoded[:first])]
        ends = [[*each] for each in encoded[first:]]
        scored_from = len(begin) + _common_length(ends)
        joined = [[*begin, *each] for each in ends[1:]]
    else:
        prompt = scoring.prompt_ids
        if scoring.segments:
            prompt = [*itertools.chain.from_iterable(await encode(scoring.segments))]
        scored_from, joined = len(prompt), [[*prompt, *each] for each in scoring.ids]
    if violations := [*_joined_violations(scoring, joined, scored_from, window)]:
        raise invalid_argument(violations)
    return [Prompt(ids, scored_from=scored_from) for ids in joined]


def _common_length(sequences: Sequence[list[int]]) -> int:
    """How many ids at the beginning of all these sequences are the same."""
    # Whatever the first and the last in alphabetical order share, those between them share, too.
    first, last = min(sequences), max(sequences)
    pairs = zip(first, last, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(first))


def _special_tags_violations(read: Dialogs, prompt_format: PromptFormat) -> list[Violation]:
    """The violation of a dialog that ChatComplete would answer with the refusal."""
    tags = ", ".join(prompt_format.special_tags)
    return [Violation(path, f"must not hold a special tag: {tags}") for path in read.unsafe]


def _prompt_violations(
    request: chat_pb2.ScoreRequest, vocab_size: int, window: Window
) -> list[Violation]:
    match request.WhichOneof("context"):
        case None:
            return [Violation("prompt", "must be given, or prompt_ids or dialog instead")]
        case "prompt_ids":
            return _ids_violations(request.prompt_ids.ids, "prompt_ids", vocab_size, window)
    return []


def _candidates_violations(
    request: chat_pb2.ScoreRequest, limits: RequestLimits, vocab_size: int, window: Window
) -> list[Violation]:
    texts, ids = request.candidates, request.candidate_ids
    if texts and ids:
        return [Violation("candidate_ids", "cannot be given together with candidates")]
    if ids:
        return count_violations("candidate_ids", len(ids), limits.max_dialogs) or [
            violation
            for index, each in enumerate(ids)
            for violation in _ids_violations(
                each.ids, f"candidate_ids[{index}]", vocab_size, window
            )
        ]
    if texts and request.HasField("prompt_ids"):
        return [
            Violation(
                "candidates", "need a prompt or a dialog; behind prompt_ids, give candidate_ids"
            )
        ]
    return count_violations("candidates", len(texts), limits.max_dialogs) or [
        Violation(f"candidates[{index}]", "must not be empty")
        for index, text in enumerate(texts)
        if not text
    ]


def _ids_violations(
    ids: Sequence[int], path: str, vocab_size: int, window: Window
) -> list[Violation]:
    if not ids:
        return [Violation(f"{path}.ids", "must not be empty")]
    if len(ids) > window.length:  # its ids need no check
        return [Violation(path, f"has {len(ids)} tokens, the context length is {window.length}")]
    return token_id_violations(ids, vocab_size, f"{path}.ids")


def _size_violations(scoring: Scoring, window: Window) -> Iterator[Violation]:
    """Violations of what certainly does not fit, so that it need not be encoded."""
    least = window.least_tokens(window.size(scoring.segments))
    if least > window.length:
        yield Violation(scoring.prompt_field, too_long(f"at least {least}", window.length))
        return
    size = sum(len(segment.text.encode()) for segment in scoring.segments[-1:])
    joined = sum(size + len(text.encode()) for text in scoring.texts)
    if joined > MAX_JOINED_BYTES:
        rule = (
            f"with the prompt in front of each have {joined} bytes, at most {MAX_JOINED_BYTES} are "
            "scored in one call: give fewer candidates"
        )
        yield Violation("candidates", rule)
        return
    others = window.size(scoring.segments[:-1])
    for index, segment in enumerate(scoring.joined if scoring.texts else ()):
        least = window.least_tokens(window.size([segment]).plus(others))
        if least > window.length:
            yield _too_long(scoring, index, f"at least {least}", window)


def _joined_violations(
    scoring: Scoring, joined: Sequence[list[int]], scored_from: int, window: Window
) -> Iterator[Violation]:
    if not scored_from:
        rule = (
            "must have a token in front of the candidates, because nothing predicts the first "
            "token of a text, and this model's tokenizer puts no BOS there"
        )
        yield Violation(scoring.prompt_field, rule)
    for index, ids in enumerate(joined):
        if len(ids) > window.length:
            yield _too_long(scoring, index, len(ids), window)
        elif len(ids) == scored_from:
            yield Violation(scoring.path(index), "adds no token to the prompt")


def _too_long(scoring: Scoring, index: int, tokens: int | str, window: Window) -> Violation:
    rule = f"has {tokens} tokens with the prompt, the context length is {window.length}"
    return Violation(scoring.path(index), rule)
