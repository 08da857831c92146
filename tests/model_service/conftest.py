"""Engines on the golden checkpoints, in this process, and what Meta's code answered on them."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from model_service.engine.engine import Engine
from model_service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
)
from model_service.replica import ReplicaOptions, load_replica

GOLDEN = Path(__file__).parents[1] / "golden"
EOS = 2
CONTEXT = 256  # as the golden cases were computed


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""

    def add(self, output: SequenceOutput) -> None:
        self.ids += output.ids
        self.logprobs += (entry.logprob for entry in output.logprobs)
        self.finish_reason = output.finish_reason
        self.error = output.error


MakeEngine = Callable[..., Engine]
Run = Callable[[Engine, Iterable[GenerationRequest]], dict[Any, Answer]]


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


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
