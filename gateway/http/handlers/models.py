"""The handlers that describe the server: its model, its health, its version."""

import importlib.metadata
import time
from typing import Any

from gateway.http.exchange import Exchange
from gateway.http.openai.errors import error_body
from gateway.replicas.pool import ReplicaPool
from gateway.rpc.pipeline import Pipeline
from serving.standard_services.health import Health

_DISTRIBUTION = "chasqui-llama"
_RETRY_SECONDS = 1


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
        }


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
