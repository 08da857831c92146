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
from llama.v1.sampling_pb2 import SamplingParams
from serving.standard_services.health import Health

_DISTRIBUTION = "chasqui-llama"
_RETRY_SECONDS = 1
# The fields of gRPC's sampling that OpenAI's API and vLLM name otherwise.
_OTHER_NAMES = {"max_gen_len": "max_tokens", "min_gen_len": "min_tokens"}


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
    defaults = SamplingParams(max_gen_len=default_max_gen_len(context_length))
    defaults.MergeFrom(SAMPLING_DEFAULTS)
    fields = MessageToDict(defaults, preserving_proto_field_name=True)
    return {_OTHER_NAMES.get(name, name): value for name, value in fields.items()}


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
