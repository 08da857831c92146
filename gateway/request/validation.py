"""The rules of a request: each field is checked against the range that protos/llama/v1 documents,
and all violations are reported with their field paths, so that a client can fix them at once. The
rules that the model service and `llama.Llama` check too are in `serving.request_rules`.
"""

import re
from collections.abc import Mapping, Sequence

from gateway.request.options import (
    MIN_PRIORITY,
    ChatRequest,
    RequestLimits,
    TextRequest,
    choices,
)
from gateway.request.prompts import too_long
from gateway.request.window import Window
from llama.prompt_format import dialog
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import TokenIds
from serving.errors import Violation
from serving.request_rules import (
    count_violations,
    logprob_token_ids_violations,
    sampling_violations,
    token_id_violations,
    top_logprobs_violations,
)

STREAM_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")

_ROLES: Mapping[int, str] = {
    chat_pb2.ROLE_SYSTEM: dialog.SYSTEM,
    chat_pb2.ROLE_USER: dialog.USER,
    chat_pb2.ROLE_ASSISTANT: dialog.ASSISTANT,
}


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
        *context_policy_violations(request.context_policy),
        *_choices_violations(request, len(request.dialogs), limits),
        *_name_violations(request),
        *priority_violations(request.priority, limits),
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
        *priority_violations(request.priority, limits),
    ]


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


def context_policy_violations(policy: int) -> list[Violation]:
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


def priority_violations(priority: int, limits: RequestLimits) -> list[Violation]:
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
