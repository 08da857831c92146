"""Converts arguments of the clients' methods to the contract's request messages.

Only values that protobuf cannot carry are refused here, with the field path that the server would
name. All rules of the contract are checked by the server alone, so that they exist only once.
"""

from collections.abc import (
    Callable,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from typing import Literal, TypedDict, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as Protobuf

from client import arguments
from client.arguments import Refusals, choice, collected
from llama.v1 import chat_pb2, operator_pb2, sampling_pb2

Role = Literal["system", "user", "assistant"]
ContextPolicy = Literal["reject", "drop_oldest_turns"]


class Message(TypedDict):
    """One message of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]
# A text, or token ids, which are taken as they are (BOS included).
Prompt = str | Sequence[int]


class Sampling(TypedDict, total=False):
    """Sampling parameters. An absent field or None means the server's default (`get_model`)."""

    temperature: float | None
    top_p: float | None
    min_p: float | None
    top_k: int | None
    max_gen_len: int | None
    min_gen_len: int | None
    seed: int | None
    stop: str | Sequence[str] | None  # a text is one stop string
    stop_token_ids: Sequence[int] | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None


class CallOptions(TypedDict, total=False):
    """Keyword arguments of every method: `timeout` is the call's deadline in seconds.

    None and inf: no deadline.
    """

    timeout: float | None


class _Answers(CallOptions, Sampling, total=False):
    """The options that the chat and the completion methods share."""

    model: str | None  # NOT_FOUND if the gateway serves another one
    logprobs: bool | None
    top_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    priority: int | None


class ChatOptions(_Answers, total=False):
    """Keyword arguments of the chat methods."""

    context_policy: ContextPolicy | None


class TextOptions(_Answers, total=False):
    """Keyword arguments of the completion methods."""

    echo: bool | None
    exact_continuation: bool | None


class RenderOptions(CallOptions, total=False):
    """Keyword arguments of `render_prompt`; `max_gen_len` is that of the later request."""

    context_policy: ContextPolicy | None
    max_gen_len: int | None


class TokenizeOptions(CallOptions, total=False):
    """Keyword arguments of the tokenize methods; `bos` and `eos` are for texts."""

    model: str | None
    bos: bool | None  # None: BOS is put in front, as for completions
    eos: bool | None
    tokens: bool | None  # report texts, bytes and offsets, too


class DetokenizeOptions(CallOptions, total=False):
    """Keyword arguments of the detokenize methods."""

    model: str | None


class ScoreOptions(CallOptions, total=False):
    """Keyword arguments of `score`."""

    model: str | None
    top_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    priority: int | None


_ROLES: Mapping[str, chat_pb2.Role.ValueType] = {
    "system": chat_pb2.ROLE_SYSTEM,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
}
_CONTEXT_POLICIES: Mapping[str, chat_pb2.ContextPolicy.ValueType] = {
    "reject": chat_pb2.CONTEXT_POLICY_REJECT,
    "drop_oldest_turns": chat_pb2.CONTEXT_POLICY_DROP_OLDEST_TURNS,
}
# Fields with one value; the others are containers.
_SAMPLING_FIELDS = sorted(Sampling.__optional_keys__ - {"stop", "stop_token_ids", "logit_bias"})

_CHAT_FIELDS = ("model", "logprobs", "top_logprobs", "priority")
_TEXT_FIELDS = (*_CHAT_FIELDS, "echo", "exact_continuation")

_MESSAGES = 'a list of messages such as {"role": "user", "content": "…"}'
_MESSAGE = 'a message such as {"role": "user", "content": "…"}'
_MAX_ID = 2**32 - 1

# The conversion of a value to each type of field.
_SCALARS: Mapping[int, Callable[[object], object]] = {
    FieldDescriptor.CPPTYPE_UINT32: lambda value: arguments.integer(value, 0, _MAX_ID),
    FieldDescriptor.CPPTYPE_UINT64: lambda value: arguments.integer(value, 0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_INT32: lambda value: arguments.integer(value, -(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: arguments.number,
    FieldDescriptor.CPPTYPE_BOOL: arguments.flag,
    FieldDescriptor.CPPTYPE_STRING: arguments.text,
}

# The unary and the streaming request of a kind have the same fields.
ChatRequest = TypeVar(
    "ChatRequest", chat_pb2.ChatCompleteRequest, chat_pb2.ChatCompleteStreamRequest
)
TextRequest = TypeVar(
    "TextRequest", chat_pb2.TextCompleteRequest, chat_pb2.TextCompleteStreamRequest
)


def chat(
    kind: type[ChatRequest],
    dialogs: Sequence[Dialog],
    options: ChatOptions,
    n: int | None = None,
) -> ChatRequest:
    """A request of this kind. InvalidRequestError: some values cannot be sent."""
    request = kind()
    with collected(options, ChatOptions.__optional_keys__) as refusals:
        for index, dialog in enumerate(refusals.items("dialogs", dialogs, "a list of dialogs")):
            _set_dialog(request.dialogs.add(), dialog, f"dialogs[{index}]", refusals)
        _set_sampling(request.sampling, options, refusals)
        _set_fields(request, _CHAT_FIELDS, options, "", refusals)
        _set_ids(request.logprob_token_ids, options, "logprob_token_ids", "", refusals)
        _set_context_policy(request, options, refusals)
        _set_fields(request, ("n",), {"n": n}, "", refusals)
    return request


def text(
    kind: type[TextRequest],
    prompts: Sequence[Prompt],
    options: TextOptions,
    n: int | None = None,
) -> TextRequest:
    """A request of this kind, with texts or token ids; the contract refuses both in one request."""
    request = kind()
    with collected(options, TextOptions.__optional_keys__) as refusals:
        for index, prompt in enumerate(refusals.items("prompts", prompts, "a list of prompts")):
            _add_prompt(request, prompt, index, refusals)
        _set_sampling(request.sampling, options, refusals)
        _set_fields(request, _TEXT_FIELDS, options, "", refusals)
        _set_ids(request.logprob_token_ids, options, "logprob_token_ids", "", refusals)
        _set_fields(request, ("n",), {"n": n}, "", refusals)
    return request


def render_prompt(dialog: Dialog, options: RenderOptions) -> chat_pb2.RenderPromptRequest:
    """A request for the prompt of one dialog."""
    request = chat_pb2.RenderPromptRequest()
    with collected(options, RenderOptions.__optional_keys__) as refusals:
        _set_dialog(request.dialog, dialog, "dialog", refusals)
        _set_context_policy(request, options, refusals)
        _set_fields(request, ("max_gen_len",), options, "", refusals)
    return request


def tokenize(inputs: Sequence[str | Dialog], options: TokenizeOptions) -> chat_pb2.TokenizeRequest:
    """A request for the tokens of texts or dialogs; the contract refuses both in one request."""
    request = chat_pb2.TokenizeRequest()
    with collected(options, TokenizeOptions.__optional_keys__) as refusals:
        given = refusals.items("texts", inputs, "a list of texts or of dialogs")
        for index, each in enumerate(given):
            if isinstance(each, str):
                with refusals.at(f"texts[{index}]"):
                    request.texts.append(each)
            else:
                _set_dialog(request.dialogs.add(), each, f"dialogs[{index}]", refusals)
        _set_fields(request, ("model", "bos", "eos", "tokens"), options, "", refusals)
    return request


def detokenize(
    sequences: Sequence[Sequence[int]], options: DetokenizeOptions
) -> chat_pb2.DetokenizeRequest:
    """A request for the texts of sequences of token ids."""
    request = chat_pb2.DetokenizeRequest()
    with collected(options, DetokenizeOptions.__optional_keys__) as refusals:
        given = refusals.items("sequences", sequences, "a list of lists of token ids")
        for index, each in enumerate(given):
            path = f"sequences[{index}]"
            ids = refusals.items(path, each, "a list of token ids")
            _add_ids(request.sequences.add().ids, ids, f"{path}.ids", refusals)
        _set_fields(request, ("model",), options, "", refusals)
    return request


def score(
    prompt: Prompt | Dialog, candidates: Sequence[Prompt], options: ScoreOptions
) -> chat_pb2.ScoreRequest:
    """A request for the scores of candidates, all texts or all token ids, behind a prompt."""
    request = chat_pb2.ScoreRequest()
    with collected(options, ScoreOptions.__optional_keys__) as refusals:
        _set_context(request, prompt, refusals)
        given = refusals.items("candidates", candidates, "a list of candidates")
        for index, each in enumerate(given):
            path = f"candidates[{index}]"
            if isinstance(each, str):
                with refusals.at(path):
                    request.candidates.append(each)
            else:
                ids = refusals.items(path, each, "a text or a list of token ids")
                target = request.candidate_ids.add().ids
                _add_ids(target, ids, f"candidate_ids[{index}].ids", refusals)
        _set_fields(request, ("model", "top_logprobs", "priority"), options, "", refusals)
        _set_ids(request.logprob_token_ids, options, "logprob_token_ids", "", refusals)
    return request


def get_model(options: CallOptions) -> chat_pb2.GetModelRequest:
    """A request for the served model."""
    with collected(options, CallOptions.__optional_keys__):
        return chat_pb2.GetModelRequest()


def get_status(options: CallOptions) -> operator_pb2.GetStatusRequest:
    """A request for the gateway's status."""
    with collected(options, CallOptions.__optional_keys__):
        return operator_pb2.GetStatusRequest()


def deadline(options: CallOptions) -> float | None:
    """The deadline of a call in seconds; None: no deadline."""
    return arguments.seconds(options.get("timeout"))


def _set_dialog(target: chat_pb2.Dialog, dialog: object, path: str, refusals: Refusals) -> None:
    for index, message in enumerate(refusals.items(path, dialog, _MESSAGES)):
        added, at = target.messages.add(), f"{path}.messages[{index}]"
        if not isinstance(message, Mapping):
            refusals.add(at, f"must be {_MESSAGE}, not {arguments.kind(message)}")
            continue
        with refusals.at(f"{at}.role"):
            added.role = choice(_ROLES, message.get("role"))
        with refusals.at(f"{at}.content"):
            added.content = arguments.text(message.get("content"))


def _add_prompt(
    request: chat_pb2.TextCompleteRequest | chat_pb2.TextCompleteStreamRequest,
    prompt: object,
    index: int,
    refusals: Refusals,
) -> None:
    if isinstance(prompt, str):
        with refusals.at(f"prompts[{index}]"):
            request.prompts.append(prompt)
        return
    ids, path = request.prompt_ids.add().ids, f"prompt_ids[{index}]"
    given = refusals.items(f"prompts[{index}]", prompt, "a text or a list of token ids")
    _add_ids(ids, given, f"{path}.ids", refusals)


def _set_context(request: chat_pb2.ScoreRequest, prompt: object, refusals: Refusals) -> None:
    """The prompt of candidates: a text, a dialog if its first item is a message, or token ids."""
    if isinstance(prompt, str):
        with refusals.at("prompt"):
            request.prompt = prompt
        return
    given = refusals.items("prompt", prompt, "a text, a dialog or a list of token ids")
    if given and isinstance(given[0], Mapping):
        _set_dialog(request.dialog, given, "dialog", refusals)
        return
    request.prompt_ids.SetInParent()
    _add_ids(request.prompt_ids.ids, given, "prompt_ids.ids", refusals)


def _add_ids(
    target: MutableSequence[int], ids: Sequence[object], path: str, refusals: Refusals
) -> None:
    try:
        target.extend([arguments.integer(token_id, 0, _MAX_ID) for token_id in ids])
    except ValueError:
        for index, token_id in enumerate(ids):
            with refusals.at(f"{path}[{index}]"):
                arguments.integer(token_id, 0, _MAX_ID)


def _set_context_policy(
    request: chat_pb2.ChatCompleteRequest
    | chat_pb2.ChatCompleteStreamRequest
    | chat_pb2.RenderPromptRequest,
    options: Mapping[str, object],
    refusals: Refusals,
) -> None:
    policy = options.get("context_policy")
    with refusals.at("context_policy"):
        request.context_policy = choice(_CONTEXT_POLICIES, "reject" if policy is None else policy)


def _set_fields(
    target: Protobuf,
    names: Sequence[str],
    options: Mapping[str, object],
    prefix: str,
    refusals: Refusals,
) -> None:
    for name in names:
        if (value := options.get(name)) is not None:
            field = target.DESCRIPTOR.fields_by_name[name]
            with refusals.at(prefix + name):
                setattr(target, name, _SCALARS[field.cpp_type](value))


def _set_sampling(
    target: sampling_pb2.SamplingParams, options: Sampling, refusals: Refusals
) -> None:
    _set_fields(target, _SAMPLING_FIELDS, options, "sampling.", refusals)
    if (stop := options.get("stop")) is not None:
        texts: Sequence[object] = [stop]
        if not isinstance(stop, str):
            texts = refusals.items(
                "sampling.stop", stop, "a text or a list of texts", ordered=False
            )
        for index, string in enumerate(texts):
            with refusals.at(f"sampling.stop[{index}]"):
                target.stop.append(arguments.text(string))
    _set_ids(target.stop_token_ids, options, "stop_token_ids", "sampling.", refusals)
    if (biases := options.get("logit_bias")) is not None:
        _set_logit_bias(target.logit_bias, biases, refusals)


def _set_ids(
    target: MutableSequence[int],
    options: Mapping[str, object],
    name: str,
    prefix: str,
    refusals: Refusals,
) -> None:
    if (given := options.get(name)) is not None:
        ids = refusals.items(
            prefix + name, given, "a list of token ids", ordered=name == "logprob_token_ids"
        )
        _add_ids(target, ids, prefix + name, refusals)


def _set_logit_bias(target: MutableMapping[int, float], biases: object, refusals: Refusals) -> None:
    if not isinstance(biases, Mapping):
        rule = f"must be a dictionary of token ids and numbers, not {arguments.kind(biases)}"
        refusals.add("sampling.logit_bias", rule)
        return
    for token_id, bias in biases.items():
        with refusals.at(f"sampling.logit_bias[{token_id}]"):
            target[arguments.integer(token_id, 0, _MAX_ID)] = arguments.number(bias)
