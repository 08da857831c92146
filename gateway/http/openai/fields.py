"""The request bodies that are served, field by field: those of OpenAI's API, and a few of Chasqui's
own beside them.

Only types are checked here. Ranges are the pipeline's rules, which see the same request whatever
its protocol. A field that is not listed is refused by its name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from serving.request_rules import MAX_UINT32

# The tags of alternatives; an error's path leaves out what is in angle brackets.
_TEXT, _TEXTS, _IDS, _ID_LISTS, _PARTS = "<text>", "<texts>", "<ids>", "<id lists>", "<parts>"

UInt32 = Annotated[int, Field(ge=0, le=MAX_UINT32)]


class Body(BaseModel):
    """Types as JSON has them: no text stands for a number, no number for a text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _kind_of_content(value: object) -> str:
    return _PARTS if isinstance(value, list) else _TEXT


def _kind_of_prompt(value: object) -> str:
    if not isinstance(value, list):
        return _TEXT
    first = value[0] if value else ""
    if isinstance(first, list):
        return _ID_LISTS
    return _TEXTS if isinstance(first, str) else _IDS


def _kind_of_stop(value: object) -> str:
    return _TEXTS if isinstance(value, list) else _TEXT


Prompt = str | list[str] | list[int] | list[list[int]]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[TextPart], Tag(_PARTS)],
        Discriminator(_kind_of_content),
        Field(description="a text, or parts of one, which are joined"),
    ]


class StreamOptions(Body):
    include_usage: Annotated[
        bool | None, Field(description="a last chunk without choices has the usage")
    ] = None
    continuous_usage_stats: Annotated[
        bool | None, Field(description="every chunk has the usage so far; as vLLM has it")
    ] = None


class ResponseFormat(Body):
    type: Literal["text"]


class CompletionBody(Body):
    """The fields that both kinds of completions have."""

    model: Annotated[str, Field(description="the name of the served model, or empty")] = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: UInt32 | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[
        Annotated[str | None, Tag(_TEXT)] | Annotated[list[str], Tag(_TEXTS)],
        Discriminator(_kind_of_stop),
    ] = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[UInt32, float] | None = None
    user: Annotated[str | None, Field(description="accepted, and not used")] = None
    # Chasqui's own, under the names that they have in vLLM.
    top_k: UInt32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: UInt32 | None = None
    stop_token_ids: list[UInt32] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


class ChatCompletionBody(CompletionBody):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_tokens: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    response_format: ResponseFormat | None = None


class TextCompletionBody(CompletionBody):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag(_TEXT)]
        | Annotated[list[str], Tag(_TEXTS)]
        | Annotated[list[UInt32], Tag(_IDS)]
        | Annotated[list[list[UInt32]], Tag(_ID_LISTS)],
        Discriminator(_kind_of_prompt),
        Field(description="a text, several, token ids, or several lists of token ids"),
    ]
    max_tokens: Annotated[
        UInt32 | None, Field(description="16 where absent, as OpenAI's API has it")
    ] = None
    logprobs: Annotated[
        UInt32 | None, Field(description="how many alternatives are reported at each position")
    ] = None
    echo: bool | None = None


def property_path(location: tuple[int | str, ...]) -> str:
    """A place in a body as clients write it: messages[0].content."""
    path = ""
    for each in location:
        if isinstance(each, int):
            path += f"[{each}]"
        elif not (each.startswith(("<", "[")) and each.endswith((">", "]"))):
            path += f".{each}" if path else each
    return path


def without(body: JsonValue, location: tuple[int | str, ...]) -> None:
    """Removes the property at a place of a parsed body."""
    *path, last = (each for each in location if not str(each).startswith("<"))
    found: Any = body
    for each in path:
        found = found[each]
    del found[last]
