"""Tokenize and Detokenize in vLLM's shapes: from bodies to messages, and from those to JSON."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from gateway.http.openai.fields import Body, ChatMessage, UInt32
from gateway.http.openai.requests import Naming, dialog
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import TokenIds
from serving.errors import Violation, invalid_argument

_TOKENIZE_NAMES = Naming(
    (
        (r"^texts(\[0\])?$", "prompt"),
        (r"^dialogs\[0\](\.messages\b)?", "messages"),
        (r"^bos$", "add_special_tokens"),
        (r"\bwith dialogs$", "with messages"),
        ("`tokens`", "return_token_strs"),
    )
)
_DETOKENIZE_NAMES = Naming(((r"^sequences\[0\]\.ids\b", "tokens"), (", or leave out `tokens`", "")))


class TokenizeBody(Body):
    """The body of POST /tokenize: a prompt, or messages."""

    model: Annotated[str, Field(description="the name of the served model, or empty")] = ""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: Annotated[
        bool | None,
        Field(description="with prompt: BOS in front, if the model has one; true where absent"),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Field(description="with messages: true, or absent")
    ] = None
    return_token_strs: Annotated[
        bool | None,
        Field(description="the text of each token, too, and the name of control tokens"),
    ] = None


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    model: Annotated[str, Field(description="the name of the served model, or empty")] = ""
    tokens: list[UInt32]


def tokenize_request(body: TokenizeBody) -> tuple[chat_pb2.TokenizeRequest, Naming]:
    """The request, and the names of its fields.

    Raises:
        RequestError: INVALID_ARGUMENT if nothing is given to tokenize, or if the messages are to be
            rendered otherwise than for an answer.
    """
    if body.prompt is None and body.messages is None:
        raise invalid_argument([Violation("prompt", "must be given, or messages instead")])
    if body.add_generation_prompt is False:
        rule = "must be true: the messages are rendered as for an answer, up to where it begins"
        raise invalid_argument([Violation("add_generation_prompt", rule)])
    bos = body.add_special_tokens
    if body.messages is not None and not bos:
        bos = None  # rendered messages have the special tokens of their format, and no others
    request = chat_pb2.TokenizeRequest(
        model=body.model,
        texts=[] if body.prompt is None else [body.prompt],
        dialogs=[] if body.messages is None else [dialog(body.messages)],
        bos=bos,
        tokens=bool(body.return_token_strs),
    )
    return request, _TOKENIZE_NAMES


def detokenize_request(body: DetokenizeBody) -> tuple[chat_pb2.DetokenizeRequest, Naming]:
    """The request, and the names of its fields."""
    sequences = [TokenIds(ids=body.tokens)]
    return chat_pb2.DetokenizeRequest(model=body.model, sequences=sequences), _DETOKENIZE_NAMES


def tokenization(
    response: chat_pb2.TokenizeResponse,
    max_model_len: int,
    control_ids: Mapping[str, int],
    *,
    token_strs: bool,
) -> dict[str, Any]:
    """The answer; `control_ids` are those of control tokens, which have no text, by their names."""
    [found] = response.tokenizations
    names = {token_id: name for name, token_id in control_ids.items()}
    return {
        "count": len(found.ids),
        "max_model_len": max_model_len,
        "tokens": [*found.ids],
        "token_strs": [names.get(token.id, token.text) for token in found.tokens]
        if token_strs
        else None,
    }
