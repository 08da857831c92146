"""The rules of a request: each field is checked against the range that protos/llama/v1 documents,
and all violations are reported with their field paths, so that a client can fix them at once. The
rules that the model service and `llama.Llama` check too are in `serving.request_rules`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.request.prompts import Window, too_long
from gateway.text.stop_strings import StopString
from llama.prompt_format import dialog
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import SamplingParams, TokenIds
from serving.errors import Violation
from serving.request_rules import (
    DEFAULT_FREQUENCY_PENALTY,
    DEFAULT_MIN_P,
    DEFAULT_PRESENCE_PENALTY,
    DEFAULT_REPETITION_PENALTY,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
    count_violations,
    logprob_token_ids_violations,
    sampling_violations,
    token_id_violations,
    top_logprobs_violations,
)
from serving.security.caller import CallerLimits

STREAM_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
MIN_PRIORITY, MAX_PRIORITY = -100, 100

# The values of absent fields; `max_gen_len` has a default too, which depends on the context length.
SAMPLING_DEFAULTS = SamplingParams(
    temperature=DEFAULT_TEMPERATURE,
    top_p=DEFAULT_TOP_P,
    min_p=DEFAULT_MIN_P,
    repetition_penalty=DEFAULT_REPETITION_PENALTY,
    presence_penalty=DEFAULT_PRESENCE_PENALTY,
    frequency_penalty=DEFAULT_FREQUENCY_PENALTY,
    min_gen_len=0,
    ignore_eos=False,
)

_ROLES: Mapping[int, str] = {
    chat_pb2.ROLE_SYSTEM: dialog.SYSTEM,
    chat_pb2.ROLE_USER: dialog.USER,
    chat_pb2.ROLE_ASSISTANT: dialog.ASSISTANT,
}

ChatRequest = chat_pb2.ChatCompleteRequest | chat_pb2.ChatCompleteStreamRequest
TextRequest = chat_pb2.TextCompleteRequest | chat_pb2.TextCompleteStreamRequest


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The configured limits of a request."""

    max_dialogs: int
    max_messages: int
    max_choices: int
    max_sequences: int  # of all requests, running or waiting
    max_priority: int = MAX_PRIORITY

    def within(self, key: CallerLimits) -> "RequestLimits":
        """These limits, lowered to those of an API key.

        Without this, the queue would advise a request that alone exceeds its key's limit to retry.
        """
        max_sequences = self.max_sequences
        if key.max_sequences is not None:
            max_sequences = min(max_sequences, key.max_sequences)
        return RequestLimits(
            max_dialogs=min(self.max_dialogs, max_sequences),
            max_messages=self.max_messages,
            max_choices=self.max_choices,
            max_sequences=max_sequences,
            max_priority=min(self.max_priority, key.max_priority),
        )


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a checked request."""

    sampling: SamplingParams  # defaults filled in, without `stop` and perhaps without `seed`
    stop: tuple[StopString, ...]
    logprobs: bool
    top_logprobs: int
    logprob_token_ids: tuple[int, ...] = ()
    echo: bool = False
    exact_continuation: bool = False
    n: int = 1  # answers to each dialog or prompt
    priority: int = 0

    @property
    def prompt_logprobs(self) -> bool:
        """Whether the model reports the prompt's tokens, in front of the answer's."""
        return self.echo and self.logprobs


def options(request: ChatRequest | TextRequest, context_length: int) -> Options:
    """The options of a request without violations."""
    sampling = SamplingParams()
    sampling.CopyFrom(SAMPLING_DEFAULTS)
    sampling.max_gen_len = default_max_gen_len(context_length)
    sampling.MergeFrom(request.sampling)
    stop = tuple(StopString.compile(text) for text in sampling.stop)
    del sampling.stop[:]
    echo = exact_continuation = False
    if isinstance(request, TextRequest):
        echo, exact_continuation = request.echo, request.exact_continuation
    return Options(
        sampling,
        stop,
        request.logprobs,
        request.top_logprobs,
        tuple(request.logprob_token_ids),
        echo=echo,
        exact_continuation=exact_continuation,
        n=choices(request),
        priority=request.priority,
    )


def choices(request: ChatRequest | TextRequest) -> int:
    """Answers to each dialog or prompt of a request."""
    return request.n if request.HasField("n") else 1


def default_max_gen_len(context_length: int) -> int:
    """Meta's default, all of the context but one token; at least 1."""
    return max(1, context_length - 1)


def parse_dialog(message: chat_pb2.Dialog) -> list[dialog.Message]:
    """The dialog in the form that llama.prompt_format.dialog works on."""
    return [dialog.Message(_ROLES.get(each.role, ""), each.content) for each in message.messages]


def chat_violations(
    request: ChatRequest,
    of_dialogs: Sequence[Violation],
    limits: RequestLimits,
    vocab_size: int,
) -> list[Violation]:
    """All violations of a chat request, those of its dialogs included."""
    return [
        *of_dialogs,
        *sampling_violations(request.sampling, vocab_size),
        *_logprobs_violations(request, vocab_size),
        *_context_policy_violations(request.context_policy),
        *_choices_violations(request, len(request.dialogs), limits),
        *_name_violations(request),
        *_priority_violations(request.priority, limits),
    ]


def text_violations(
    request: TextRequest, limits: RequestLimits, vocab_size: int, window: Window
) -> list[Violation]:
    """All violations of a text request."""
    if request.prompts and request.prompt_ids:
        found = [Violation("prompt_ids", "cannot be given together with prompts")]
    elif request.prompt_ids:
        found = count_violations("prompt_ids", len(request.prompt_ids), limits.max_dialogs)
        if not found:
            found = _prompt_ids_violations(request.prompt_ids, vocab_size, window)
    else:
        found = count_violations("prompts", len(request.prompts), limits.max_dialogs)
    return [
        *found,
        *sampling_violations(request.sampling, vocab_size),
        *_logprobs_violations(request, vocab_size),
        *_choices_violations(request, len(request.prompts) + len(request.prompt_ids), limits),
        *_name_violations(request),
        *_priority_violations(request.priority, limits),
    ]


def render_violations(
    request: chat_pb2.RenderPromptRequest, of_dialog: Sequence[Violation]
) -> list[Violation]:
    """All violations of a RenderPrompt request, those of its dialog included."""
    return [*of_dialog, *_context_policy_violations(request.context_policy)]


def stream_name_violations(stream_name: str) -> list[Violation]:
    """The violation of a malformed stream name."""
    if STREAM_NAME.fullmatch(stream_name):
        return []
    rule = 'must be 1 to 128 characters of A-Z, a-z, 0-9, ".", "_" and "-"'
    return [Violation("stream_name", rule)]


def _name_violations(request: ChatRequest | TextRequest) -> list[Violation]:
    match request:
        case chat_pb2.ChatCompleteStreamRequest() | chat_pb2.TextCompleteStreamRequest():
            return stream_name_violations(request.stream_name) if request.stream_name else []
    return []


def _context_policy_violations(policy: int) -> list[Violation]:
    """The violation of an unknown policy: protocol buffers accept any number for an enum."""
    if policy in chat_pb2.ContextPolicy.values():
        return []
    return [Violation("context_policy", f"must be a value of ContextPolicy, not {policy}")]


def _choices_violations(
    request: ChatRequest | TextRequest, prompts: int, limits: RequestLimits
) -> list[Violation]:
    n = choices(request)
    if not 1 <= n <= limits.max_choices:
        return [Violation("n", f"must be 1 to {limits.max_choices}, not {n}")]
    # The queue would never admit such a request, but advise its client to retry.
    if n > 1 and prompts <= limits.max_dialogs and prompts * n > limits.max_sequences:
        rule = f"times the {prompts} dialogs or prompts must be at most {limits.max_sequences}"
        return [Violation("n", f"{rule}, not {prompts * n}")]
    return []


def _priority_violations(priority: int, limits: RequestLimits) -> list[Violation]:
    if MIN_PRIORITY <= priority <= limits.max_priority:
        return []
    return [
        Violation("priority", f"must be {MIN_PRIORITY} to {limits.max_priority}, not {priority}")
    ]


def _prompt_ids_violations(
    prompts: Sequence[TokenIds], vocab_size: int, window: Window
) -> list[Violation]:
    found = []
    for index, prompt in enumerate(prompts):
        path = f"prompt_ids[{index}].ids"
        if not prompt.ids:
            found.append(Violation(path, "must not be empty"))
        if len(prompt.ids) > window.length:  # its ids need no check
            found.append(too_long(f"prompt_ids[{index}]", len(prompt.ids), window))
            continue
        found += token_id_violations(prompt.ids, vocab_size, path)
    return found


def _logprobs_violations(request: ChatRequest | TextRequest, vocab_size: int) -> list[Violation]:
    found = [
        *top_logprobs_violations(request.top_logprobs),
        *logprob_token_ids_violations(request.logprob_token_ids, vocab_size),
    ]
    if found or request.logprobs:
        return found
    details = {
        "top_logprobs": request.top_logprobs,
        "logprob_token_ids": request.logprob_token_ids,
    }
    return [Violation(name, "needs logprobs") for name, value in details.items() if value]
