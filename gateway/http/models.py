"""The handlers that describe the server: its model, its health, its version."""

import importlib.metadata
import time
from typing import Any

from google.protobuf.json_format import MessageToDict

from gateway.http.exchange import Exchange
from gateway.http.openai.errors import error_body
from gateway.replicas.pool import ReplicaPool
from gateway.request.options import SAMPLING_DEFAULTS, default_max_gen_len
from gateway.rpc.pipeline import Pipeline
from serving.standard_services.health import Health

_DISTRIBUTION = "chasqui-llama"
_RETRY_SECONDS = 1
# Sampling fields that have the same name in both APIs.
_SAME_NAME = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class Models:
    """Describes the model that the replicas serve, in OpenAI's form."""

    def __init__(self, pipeline: Pipeline, replicas: ReplicaPool) -> None:
        self._pipeline = pipeline
        self._replicas = replicas
        self._created = int(time.time())

    async def list_all(self, exchange: Exchange) -> None:
        await exchange.answer({"object": "list", "data": [self._model()]})

    async def retrieve(self, exchange: Exchange) -> None:
        self._pipeline.require_model(exchange.path_params["model"])
        await exchange.answer(self._model())

    def _model(self) -> dict[str, Any]:
        model = self._replicas.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "chasqui",
            "max_model_len": model.context_length,  # vLLM's field
            "max_choices": self._pipeline.limits().max_choices,
            "default_sampling": _default_sampling(model.context_length),
            "special_tags": [*self._pipeline.prompt_format.special_tags],
        }


def _default_sampling(context_length: int) -> dict[str, Any]:
    """The values of absent fields."""
    defaults = MessageToDict(SAMPLING_DEFAULTS, preserving_proto_field_name=True)
    same = {name: defaults[name] for name in _SAME_NAME}
    return {**same, "max_tokens": default_max_gen_len(context_length)}


def version() -> str:
    """The version of the distribution."""
    return importlib.metadata.version(_DISTRIBUTION)


async def answer_version(exchange: Exchange) -> None:
    await exchange.answer({"version": version()})


async def answer_health(health: Health, exchange: Exchange) -> None:
    """Tells gRPC's health: 200 if it is SERVING, else 503."""
    if health.serving:
        await exchange.answer({"status": "serving"})
        return
    message = "the server cannot answer requests now"
    body = error_body(message, 503, "unavailable")
    await exchange.answer(body, 503, {"retry-after": str(_RETRY_SECONDS)})
