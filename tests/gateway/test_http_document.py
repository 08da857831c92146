"""The OpenAPI document beside what is served."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from gateway.http.openai import answer_fields
from llama.v1.model_pb2 import TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from tests.gateway.conftest import RunningGateway, ScriptedModel

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 1},
    TEXT: {"prompt": "Once", "logprobs": 1},
}


@pytest.fixture
async def http(gateway: RunningGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as client:
        yield client


async def answered(
    http: httpx2.AsyncClient, model: ScriptedModel, path: str, **fields: Any
) -> httpx2.Response:
    sent = asyncio.create_task(http.post(path, json=BODIES[path] | fields))
    sequence = (await model.starts.get()).sequence_id
    event: Any = {
        "logprobs": [-1.0],
        "ranks": [1],
        "top": [TopLogprobs(ids=[301], logprobs=[-0.5])],
    }
    model.tell(sequence, ids=[300], **event)
    model.tell(sequence, ids=[302], finish_reason=FINISH_REASON_STOP, **event)
    return await sent


@pytest.mark.parametrize(
    ("path", "shape", "chunk"),
    [
        (CHAT, answer_fields.ChatCompletion, answer_fields.ChatCompletionChunk),
        (TEXT, answer_fields.TextCompletion, answer_fields.TextCompletion),
    ],
)
async def test_answers_have_the_fields_of_the_document_and_no_others(
    path: str,
    shape: type[BaseModel],
    chunk: type[BaseModel],
    http: httpx2.AsyncClient,
    model: ScriptedModel,
) -> None:
    unary = await answered(http, model, path)
    shape.model_validate_json(unary.content)
    stream = await answered(http, model, path, stream=True, stream_options={"include_usage": True})
    lines = [line[6:] for line in stream.text.splitlines() if line.startswith("data: {")]
    for line in lines:
        chunk.model_validate_json(line)
    assert len(lines) == 4
    assert json.loads(lines[-1])["usage"] == unary.json()["usage"]


async def test_document_lists_each_route_with_its_methods(http: httpx2.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    for path, operations in document["paths"].items():
        here = path.replace("{model}", "scripted")
        for method in ("get", "post", "put"):
            response = await http.request(method.upper(), here)
            assert (response.status_code == 405) is (method not in operations), here
    models = await http.get("/v1/models")
    answer_fields.ModelList.model_validate_json(models.content)
    [model] = models.json()["data"]
    assert (await http.get("/v1/models/scripted")).json() == model
    assert model["default_sampling"]["temperature"] == 0.6
    assert (model["default_sampling"]["max_tokens"], model["max_choices"]) == (255, 16)
    assert "[INST]" in model["special_tags"]
    answer_fields.Error.model_validate_json((await http.get("/v1/nothing")).content)
