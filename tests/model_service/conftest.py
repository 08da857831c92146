"""Engines on the golden checkpoints, in this process, and what Meta's code answered on them."""

import dataclasses
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from model_service.engine.engine import Engine
from model_service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
)
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.attention.backend import (
    AttentionBackend,
    CacheShape,
    SequenceSpan,
)
from model_service.model.attention.sdpa import SdpaAttention
from tests.model_service import flashinfer_double

GOLDEN = Path(__file__).parents[1] / "golden"
EOS = 2
CONTEXT = 256  # as the golden cases were computed


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str = ""

    def add(self, output: SequenceOutput) -> None:
        self.ids += output.ids
        self.logprobs += (entry.logprob for entry in output.logprobs)
        self.finish_reason, self.stop_token_id = output.finish_reason, output.stop_token_id
        self.error = output.error


MakeEngine = Callable[..., Engine]
Run = Callable[[Engine, Iterable[GenerationRequest]], dict[Any, Answer]]


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


def golden_for(precision: str) -> str:
    """The golden checkpoint for a precision: groups of int4 do not divide the rows of gqa's."""
    return "mha-mp1" if "int4" in precision else "gqa-mp1"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a golden checkpoint, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / "checkpoints" / name, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def make_engine() -> MakeEngine:
    def make(
        name: str = "gqa-mp1",
        folder: Path = GOLDEN / "checkpoints",
        lookahead: bool = False,
        **changes: Any,
    ) -> Engine:
        options = ReplicaOptions(folder / name, CONTEXT, dtype="float32", device="cpu")
        replica = load_replica(dataclasses.replace(options, **changes))
        limits = dataclasses.replace(replica.limits, lookahead=lookahead)
        return dataclasses.replace(replica, limits=limits).engine()

    return make


@pytest.fixture(scope="session")
def spoil() -> Callable[[Engine, int], None]:
    """Damages a token's embedding in memory: logits of sequences that hold it are NaN."""

    def damage(engine: Engine, token: int) -> None:
        engine._runner._network.get_parameter("tok_embeddings.weight")[token] = torch.nan

    return damage


@pytest.fixture(scope="session")
def cases() -> Callable[[str], list[dict[str, Any]]]:
    def read(name: str) -> list[dict[str, Any]]:
        return list(json.loads((GOLDEN / f"{name}.json").read_text())["cases"])

    return read


@pytest.fixture(scope="session")
def request_for() -> Callable[..., GenerationRequest]:
    """The engine's request for a golden case."""

    def make(case: dict[str, Any], **changes: Any) -> GenerationRequest:
        arguments = {
            "request_id": case["id"],
            "prompt_ids": tuple(case["prompt_ids"]),
            "max_gen_len": case["args"]["max_gen_len"] or CONTEXT - 1,
            "sampling": SamplingParams(temperature=0.0),
            "stop_ids": frozenset([EOS]),
            "logprobs": True,
            "prompt_logprobs": case["args"].get("echo", False),
        }
        return GenerationRequest(**(arguments | changes))

    return make


@pytest.fixture(scope="session")
def run() -> Run:
    """Adds all requests, then steps until the engine has no work."""

    def until_done(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[Any, Answer]:
        answers = {}
        for request in requests:
            engine.add(request)
            answers[request.request_id] = Answer()
        while engine.has_work:
            for output in engine.step():
                answers[output.request_id].add(output)
        return answers

    return until_done


CPU = torch.device("cpu")
HEADS = 4  # query heads of `CACHE`
CACHE = CacheShape(layers=1, blocks=25, block_size=4, kv_heads=2, head_dim=8)


class FixedSdpaAttention(SdpaAttention):
    """Decode at a fixed batch size, on the CPU: what a step changes may lie anywhere."""

    def fixed_batches(
        self, sizes: Sequence[int], context_length: int
    ) -> dict[int, AttentionBackend]:
        return dict.fromkeys(sizes, self)


MakeAttention = Callable[..., Any]


@pytest.fixture(scope="module")
def flashinfer() -> Iterator[Any]:
    """FlashInfer's stand-in, in its place while a module's tests run."""
    backend = "model_service.model.attention.flashinfer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", flashinfer_double)
        patch.delitem(sys.modules, backend, raising=False)
        yield flashinfer_double
        sys.modules.pop(backend, None)


@pytest.fixture(scope="module")
def backends(flashinfer: Any) -> dict[str, MakeAttention]:
    """All backends by name, each made from the cache's shape, the query heads and a dtype."""
    module = importlib.import_module("model_service.model.attention.flashinfer")

    def sdpa(shape: CacheShape, heads: int, kv_dtype: torch.dtype = torch.float32) -> Any:
        return FixedSdpaAttention(shape, torch.float32, CPU, kv_dtype)

    def in_parts(shape: CacheShape, heads: int, kv_dtype: torch.dtype = torch.float32) -> Any:
        return FixedSdpaAttention(shape, torch.float32, CPU, kv_dtype, min_bytes_in_place=1)

    def on_flashinfer(shape: CacheShape, heads: int, kv_dtype: torch.dtype = torch.float32) -> Any:
        return module.FlashInferAttention(
            shape, torch.float32, CPU, kv_dtype, heads=heads, max_batch_size=8
        )

    return {"sdpa": sdpa, "in parts": in_parts, "flashinfer": on_flashinfer}


def spread(
    lengths: Sequence[int], queries: Sequence[int], shape: CacheShape, seed: int
) -> list[SequenceSpan]:
    """Sequences of these lengths over blocks in random order; block 0 has no owner."""
    free = (
        torch.randperm(shape.blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
    ).tolist()
    return [
        SequenceSpan(query, length, [free.pop() for _ in range(-(-length // shape.block_size))])
        for length, query in zip(lengths, queries, strict=True)
    ]
