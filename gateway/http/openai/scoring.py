"""Score over HTTP, with the contract's names: from a body to the message, and from that to JSON."""

import math
from typing import Annotated, Any

from pydantic import Field

from gateway.http.openai.answers import MIN_LOGPROB, logprob_json, usage_json
from gateway.http.openai.fields import Body, ChatMessage, UInt32
from gateway.http.openai.requests import Naming, dialog
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import Determinism, TokenIds
from serving.errors import Violation, invalid_argument
from serving.intake.time_slice import TimeSlice

ID_PREFIX = "score-"
# The fields of which one is given.
_CONTEXTS = ("prompt", "prompt_ids", "messages")

_NAMES = Naming(
    (
        (r"^dialog(\.messages\b|$)", "messages"),
        (r"^prompt_ids\.ids\b", "prompt_ids"),
        (r"^(candidate_ids\[\d+\])\.ids\b", r"\1"),
        (r"\bor dialog instead$", "or messages instead"),
    )
)


class ScoreBody(Body):
    """The body of POST /v1/score: what stands in front, and what may follow."""

    model: Annotated[str, Field(description="the name of the served model, or empty")] = ""
    prompt: Annotated[str | None, Field(description="a text; BOS is put in front")] = None
    prompt_ids: Annotated[
        list[UInt32] | None, Field(description="token ids, BOS included; needs candidate_ids")
    ] = None
    messages: Annotated[
        list[ChatMessage] | None, Field(description="the candidates are answers to the last one")
    ] = None
    candidates: list[str] | None = None
    candidate_ids: list[list[UInt32]] | None = None
    top_logprobs: UInt32 | None = None
    logprob_token_ids: list[UInt32] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


def score_request(body: ScoreBody) -> tuple[chat_pb2.ScoreRequest, Naming]:
    """The request, and the names of its fields.

    Raises:
        RequestError: INVALID_ARGUMENT if more than one thing stands in front of the candidates.
    """
    given = [name for name in _CONTEXTS if getattr(body, name) is not None]
    if len(given) > 1:
        rule = f"cannot be given together with {given[0]}"
        raise invalid_argument([Violation(each, rule) for each in given[1:]])
    request = chat_pb2.ScoreRequest(
        model=body.model,
        prompt_ids=None if body.prompt_ids is None else TokenIds(ids=body.prompt_ids),
        dialog=None if body.messages is None else dialog(body.messages),
        candidates=body.candidates,
        candidate_ids=[TokenIds(ids=each) for each in body.candidate_ids or ()],
        top_logprobs=body.top_logprobs or 0,
        logprob_token_ids=body.logprob_token_ids,
        priority=body.priority or 0,
    )
    if body.prompt is not None:
        request.prompt = body.prompt
    return request, _NAMES


async def score_answer(response: chat_pb2.ScoreResponse) -> dict[str, Any]:
    """The answer, made in steps that let other tasks run."""
    scores, time_slice = [], TimeSlice()
    for each in response.scores:
        tokens = []
        for token in each.tokens:
            tokens.append(_token(token))
            await time_slice.yield_if_over()
        usage = each.usage
        scores.append(
            {
                "index": each.index,
                "tokens": tokens,
                "logprob": each.logprob if math.isfinite(each.logprob) else MIN_LOGPROB,
                "is_greedy": each.is_greedy,
                "usage": usage_json(usage.prompt_tokens, usage.cached_prompt_tokens, 0),
            }
        )
    return {
        "id": f"{ID_PREFIX}{response.id}",
        "object": "score",
        "created": response.created.seconds,
        "model": response.model,
        "scores": scores,
        "fingerprint": response.fingerprint,
        "determinism": Determinism.Name(response.determinism).removeprefix("DETERMINISM_").lower(),
    }


def _token(token: chat_pb2.Token) -> dict[str, Any]:
    return {
        **_alternative(token),
        "rank": token.rank,
        "top_logprobs": [*map(_alternative, token.top_logprobs)],
        "requested_logprobs": [*map(_alternative, token.requested_logprobs)],
    }


def _alternative(token: chat_pb2.Token | chat_pb2.TokenLogprob) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "bytes": [*token.bytes],
        "logprob": logprob_json(token.logprob),
    }
