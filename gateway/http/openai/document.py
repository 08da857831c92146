"""The OpenAPI document of what is served, made from the fields of bodies."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.http.openai import answer_fields
from gateway.http.openai.fields import ChatCompletionBody, TextCompletionBody
from gateway.http.openai.requests import IDEMPOTENCY_KEY, LAST_EVENT_ID
from gateway.http.openai.scoring import ScoreBody
from gateway.http.openai.tokenizing import DetokenizeBody, TokenizeBody
from gateway.http.rate_limits import HEADERS as RATE_LIMITS
from gateway.request.validation import STREAM_NAME
from serving.telemetry.request_id import METADATA_KEY

_SCHEMAS = "#/components/schemas/{model}"
# Statuses of every request, of those with a body, and of those for completions.
_REFUSALS: Mapping[int, str] = {
    400: "A field, a header or the request itself is wrong; `param` names the field.",
    401: "The key is missing or not known.",
    403: "The key lacks the permission.",
    404: "There is no such model, stream or path.",
    405: "The path has no such method.",
    431: "The headers are too large.",
    500: "The server failed; its log has the request id.",
    503: "There is no model now, or the server shuts down; `Retry-After` says when to try again.",
}
_OF_BODIES: Mapping[int, str] = {
    408: "The body did not arrive in time.",
    413: "The request or its answer is larger than allowed.",
    429: "Too much is running; `Retry-After` says when to try again.",
}
_OF_COMPLETIONS: Mapping[int, str] = {
    416: "The events behind `Last-Event-ID` are not kept any more, or not there yet.",
}
_STREAM = (
    "chunks as server-sent events, the last one `data: [DONE]`. An error after the first chunk is "
    "an event with an error object."
)


def openapi_document(version: str) -> dict[str, Any]:
    """The document of this version of the server."""
    bodies: list[type[BaseModel]] = [
        *(ChatCompletionBody, TextCompletionBody),
        *(answer_fields.ChatCompletion, answer_fields.ChatCompletionChunk),
        *(answer_fields.TextCompletion, answer_fields.Model, answer_fields.ModelList),
        *(TokenizeBody, DetokenizeBody, ScoreBody),
        *(answer_fields.Tokenization, answer_fields.Detokenization, answer_fields.TokenizerInfo),
        *(answer_fields.Score, answer_fields.Health, answer_fields.Version, answer_fields.Error),
    ]
    _, schemas = models_json_schema(
        [(each, "validation") for each in bodies], ref_template=_SCHEMAS
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Chasqui",
            "version": version,
            "description": "OpenAI's API, as far as it is served here, and more beside it. Absent "
            "sampling fields have the server's defaults.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _completions(
                    "createChatCompletion",
                    "Answers a dialog.",
                    ChatCompletionBody,
                    answer_fields.ChatCompletion,
                    answer_fields.ChatCompletionChunk,
                )
            },
            "/v1/completions": {
                "post": _completions(
                    "createCompletion",
                    "Continues texts.",
                    TextCompletionBody,
                    answer_fields.TextCompletion,
                    answer_fields.TextCompletion,
                )
            },
            "/v1/score": {
                "post": _posted(
                    "score",
                    "How probable each candidate is behind a prompt, token by token.",
                    ScoreBody,
                    answer_fields.Score,
                )
            },
            "/tokenize": {
                "post": _posted(
                    "tokenize",
                    "The token ids of a text, or of the prompt of a dialog; as in vLLM.",
                    TokenizeBody,
                    answer_fields.Tokenization,
                )
            },
            "/detokenize": {
                "post": _posted(
                    "detokenize",
                    "The text that token ids stand for; as in vLLM.",
                    DetokenizeBody,
                    answer_fields.Detokenization,
                )
            },
            "/tokenizer_info": {
                "get": _described(
                    "tokenizerInfo",
                    "The tokenizer by its files, as in vLLM.",
                    answer_fields.TokenizerInfo,
                )
            },
            "/v1/models": {
                "get": _described("listModels", "The served model.", answer_fields.ModelList)
            },
            "/v1/models/{model}": {
                "get": _described("retrieveModel", "The served model.", answer_fields.Model),
                "parameters": [
                    {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
            },
            "/version": {
                "get": _described("version", "The server's version.", answer_fields.Version)
            },
            "/health": {
                "get": {
                    **_described("health", "Whether it can answer.", answer_fields.Health),
                    "security": [],
                }
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _completions(
    name: str,
    summary: str,
    body: type[BaseModel],
    answer: type[BaseModel],
    chunk: type[BaseModel],
) -> dict[str, Any]:
    described = _posted(name, summary, body, answer)
    content = {
        **_json(answer),
        "text/event-stream": {"schema": {"$ref": _SCHEMAS.format(model=chunk.__name__)}},
    }
    stream_name = {"type": "string", "pattern": f"^{STREAM_NAME.pattern}$"}
    return {
        **described,
        "parameters": [
            _header(
                IDEMPOTENCY_KEY,
                stream_name,
                "Names a stream. The same request with the same key continues it.",
            ),
            _header(
                LAST_EVENT_ID,
                {"type": "string", "pattern": "^[0-9]{1,19}$"},
                "The id of the last event that arrived of a named stream.",
            ),
        ],
        "responses": {
            **described["responses"],
            "200": _response(f"The answer; with `stream`: {_STREAM}", content),
            **_errors(_OF_COMPLETIONS),
        },
    }


def _posted(
    name: str, summary: str, body: type[BaseModel], answer: type[BaseModel]
) -> dict[str, Any]:
    described = _described(name, summary, answer)
    return {
        **described,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {**described["responses"], **_errors(_OF_BODIES)},
    }


def _described(name: str, summary: str, answer: type[BaseModel]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _response(summary, _json(answer)), **_errors(_REFUSALS)},
    }


def _errors(statuses: Mapping[int, str]) -> dict[str, Any]:
    content = _json(answer_fields.Error)
    return {str(status): _response(told, content) for status, told in sorted(statuses.items())}


def _response(description: str, content: dict[str, Any]) -> dict[str, Any]:
    told = {METADATA_KEY: "the request's id, in the logs, too", **RATE_LIMITS}
    headers = {
        name: {"description": meaning, "schema": {"type": "string"}}
        for name, meaning in told.items()
    }
    return {"description": description, "content": content, "headers": headers}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=model.__name__)}}}


def _header(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": schema, "description": description}
