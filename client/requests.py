"""Arguments of the clients' methods, as the contract's request messages.

Only what protobuf cannot carry is refused here, by the path that the server would name. Every rule
of the contract is left to the server, so that there is one place that knows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypedDict, TypeVar

from google.protobuf.message import Message as Protobuf

from client.errors import Violation, invalid_request
from llama.v1 import chat_pb2, operator_pb2, sampling_pb2

Role = Literal["system", "user", "assistant"]
ContextPolicy = Literal["reject", "drop_oldest_turns"]

T = TypeVar("T")


class Message(TypedDict):
    """One message of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]
# A text, or token ids, which are taken as they are (BOS included).
Prompt = str | Sequence[int]


class Sampling(TypedDict, total=False):
    """How to choose tokens. What is absent or None takes the server's default (`get_model`)."""

    temperature: float | None
    top_p: float | None
    min_p: float | None
    top_k: int | None
    max_gen_len: int | None
    seed: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None


class CallOptions(TypedDict, total=False):
    """Keyword arguments of every method: `timeout` is the call's deadline in seconds."""

    timeout: float | None


class ChatOptions(CallOptions, Sampling, total=False):
    """Keyword arguments of the chat methods."""

    logprobs: bool
    top_logprobs: int
    context_policy: ContextPolicy


class TextOptions(CallOptions, Sampling, total=False):
    """Keyword arguments of the completion methods."""

    logprobs: bool
    top_logprobs: int
    echo: bool


class RenderOptions(CallOptions, total=False):
    """Keyword arguments of `render_prompt`; `max_gen_len` is that of the request to come."""

    context_policy: ContextPolicy
    max_gen_len: int | None


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
    """A request of this kind; refuses what cannot be sent with InvalidRequestError."""
    _refuse_unknown(options, ChatOptions.__optional_keys__)
    request = kind()
    refusals = _Refusals()
    for index, dialog in enumerate(dialogs):
        _set_dialog(request.dialogs.add(), dialog, f"dialogs[{index}]", refusals)
    _set_sampling(request.sampling, options, refusals)
    _set_fields(request, ("logprobs", "top_logprobs"), options, "", refusals)
    with refusals.at("context_policy"):
        request.context_policy = _choice(_CONTEXT_POLICIES, options.get("context_policy", "reject"))
    _set_fields(request, ("n",), {"n": n}, "", refusals)
    refusals.raise_any()
    return request


def text(
    kind: type[TextRequest],
    prompts: Sequence[Prompt],
    options: TextOptions,
    n: int | None = None,
) -> TextRequest:
    """A request of this kind; the contract takes texts or token ids, not both in one request."""
    _refuse_unknown(options, TextOptions.__optional_keys__)
    request = kind()
    refusals = _Refusals()
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            with refusals.at(f"prompts[{index}]"):
                request.prompts.append(prompt)
        else:
            with refusals.at(f"prompt_ids[{index}]"):
                request.prompt_ids.add().ids.extend(prompt)
    _set_sampling(request.sampling, options, refusals)
    _set_fields(request, ("logprobs", "top_logprobs", "echo"), options, "", refusals)
    _set_fields(request, ("n",), {"n": n}, "", refusals)
    refusals.raise_any()
    return request


def render_prompt(dialog: Dialog, options: RenderOptions) -> chat_pb2.RenderPromptRequest:
    """A request for the prompt of one dialog."""
    _refuse_unknown(options, RenderOptions.__optional_keys__)
    request = chat_pb2.RenderPromptRequest()
    refusals = _Refusals()
    _set_dialog(request.dialog, dialog, "dialog", refusals)
    with refusals.at("context_policy"):
        request.context_policy = _choice(_CONTEXT_POLICIES, options.get("context_policy", "reject"))
    _set_fields(request, ("max_gen_len",), options, "", refusals)
    refusals.raise_any()
    return request


def get_model(options: CallOptions) -> chat_pb2.GetModelRequest:
    """A request for what is served."""
    _refuse_unknown(options, CallOptions.__optional_keys__)
    return chat_pb2.GetModelRequest()


def get_status(options: CallOptions) -> operator_pb2.GetStatusRequest:
    """A request for what the gateway sees."""
    _refuse_unknown(options, CallOptions.__optional_keys__)
    return operator_pb2.GetStatusRequest()


class _Refusals:
    """Collects what protobuf refuses, so that a caller reads all of it at once."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Turns a failure to fill the field at `path` into its violation."""
        try:
            yield
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(error.object[error.start]):04X} at character {error.start}"
            self._add(path, f"holds a lone surrogate ({surrogate}), which is not valid unicode")
        except (AttributeError, TypeError) as error:
            self._add(path, f"has the wrong type ({error})")
        except ValueError as error:
            self._add(path, f"cannot be sent ({error})")

    def raise_any(self) -> None:
        if self._violations:
            raise invalid_request(self._violations)

    def _add(self, path: str, description: str) -> None:
        self._violations.append(Violation(path, description))


def _refuse_unknown(options: Mapping[str, object], known: frozenset[str]) -> None:
    # What Python does by itself for a function that spells its keyword arguments out.
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )


def _choice(choices: Mapping[str, T], name: str) -> T:
    if name not in choices:
        raise ValueError(f"{name!r} is none of {', '.join(choices)}")
    return choices[name]


def _set_dialog(target: chat_pb2.Dialog, dialog: Dialog, path: str, refusals: _Refusals) -> None:
    for index, message in enumerate(dialog):
        added = target.messages.add()
        with refusals.at(f"{path}.messages[{index}].role"):
            added.role = _choice(_ROLES, message.get("role"))
        with refusals.at(f"{path}.messages[{index}].content"):
            added.content = message.get("content")


def _set_fields(
    target: Protobuf,
    names: Sequence[str],
    options: Mapping[str, object],
    prefix: str,
    refusals: _Refusals,
) -> None:
    for name in names:
        if (value := options.get(name)) is not None:
            with refusals.at(prefix + name):
                setattr(target, name, value)


def _set_sampling(
    target: sampling_pb2.SamplingParams, options: Sampling, refusals: _Refusals
) -> None:
    _set_fields(target, _SAMPLING_FIELDS, options, "sampling.", refusals)
    for index, string in enumerate(options.get("stop") or ()):
        with refusals.at(f"sampling.stop[{index}]"):
            target.stop.append(string)
    for index, token_id in enumerate(options.get("stop_token_ids") or ()):
        with refusals.at(f"sampling.stop_token_ids[{index}]"):
            target.stop_token_ids.append(token_id)
    with refusals.at("sampling.logit_bias"):
        target.logit_bias.update(options.get("logit_bias") or {})
