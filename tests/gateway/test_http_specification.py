"""Answers against OpenAI's own published specification, which is not part of this repository."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from openapi_core import Config, OpenAPI
from openapi_core.testing import MockRequest, MockResponse
from openapi_schema_validator import OAS31Validator

from llama.v1.model_pb2 import TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from tests.gateway.conftest import RunningGateway, ScriptedModel

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 1},
    TEXT: {"prompt": "Once", "logprobs": 1},
}
BESIDE = Path(__file__).parents[3] / "shared" / "data" / "openai-openapi.yaml"
FILE = Path(os.environ.get("OPENAI_OPENAPI", BESIDE))

pytestmark = pytest.mark.skipif(
    not FILE.exists(), reason=f"no {FILE}: OpenAI's specification has to be fetched separately"
)


@pytest.fixture(scope="module")
def specification() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    whole: dict[str, Any] = yaml.load(FILE.read_text("utf-8"), loader)
    served = {"/chat/completions", "/completions", "/models", "/models/{model}"}
    found: dict[str, Any] = _with_nulls(
        whole | {"paths": {path: whole["paths"][path] for path in served}}
    )
    return found


def _with_nulls(schema: Any) -> Any:
    """OpenAPI 3.1 in place of 3.0's `nullable`, which the specification has left in some places."""
    if isinstance(schema, list):
        return [_with_nulls(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _with_nulls(each) for name, each in schema.items()}
    if found.pop("nullable", False):
        return {"anyOf": [found, {"type": "null"}]}
    return found


@pytest.fixture
async def http(gateway: RunningGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as client:
        yield client


async def completed(
    http: httpx2.AsyncClient, model: ScriptedModel, path: str, **fields: Any
) -> httpx2.Response:
    """The answer of a model that says two tokens."""
    sent = asyncio.create_task(http.post(path, json=BODIES[path] | fields))
    sequence = (await model.starts.get()).sequence_id
    top = TopLogprobs(ids=[301], logprobs=[-0.5])
    event: Any = {"logprobs": [-1.0], "ranks": [1], "top": [top]}
    model.tell(sequence, ids=[300], **event)
    model.tell(sequence, ids=[302], finish_reason=FINISH_REASON_STOP, **event)
    return await sent


def assert_specified(specification: dict[str, Any], response: httpx2.Response) -> None:
    request = response.request
    sent = MockRequest(
        "https://api.openai.com",
        request.method.lower(),
        request.url.path,
        headers={"Authorization": "Bearer key"},
    )
    answer = MockResponse(response.content, status_code=response.status_code)
    # Without its own validation: it has defaults that are not of their type.
    api = OpenAPI.from_dict(specification, config=Config(spec_validator_cls=None))
    api.validate_response(sent, answer)


@pytest.mark.parametrize("path", BODIES)
async def test_answers_are_as_specified(
    path: str, specification: Any, http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    response = await completed(http, model, path)
    assert response.status_code == 200
    assert_specified(specification, response)


@pytest.mark.parametrize(
    ("path", "schema"),
    [(CHAT, "CreateChatCompletionStreamResponse"), (TEXT, "CreateCompletionResponse")],
)
async def test_chunks_are_as_specified(
    path: str, schema: str, specification: Any, http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    response = await completed(
        http, model, path, stream=True, stream_options={"include_usage": True}
    )
    chunks = [
        json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")
    ]
    reference = {"$ref": f"#/components/schemas/{schema}"}
    validator = OAS31Validator({**reference, "components": specification["components"]})
    assert len(chunks) == 4
    for chunk in chunks:
        for choice in chunk["choices"] if path == TEXT else []:
            # Null in OpenAI's own chunks, too; the specification has only that of a whole answer.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        validator.validate(chunk)


async def test_models_and_errors_are_as_specified(
    specification: Any, http: httpx2.AsyncClient
) -> None:
    for path in ("/v1/models", "/v1/models/scripted"):
        assert_specified(specification, await http.get(path))
    error = (await http.post(CHAT, json={"messages": [], "tools": []})).json()
    reference = {"$ref": "#/components/schemas/ErrorResponse"}
    OAS31Validator({**reference, "components": specification["components"]}).validate(error)
