"""Engines on a CUDA device; all tests here are skipped where there is none.

`CUDA_TESTS_DEVICE=cpu` runs those on the CPU that need no kernels of a GPU, so that the tests
themselves are known to work before a GPU is at hand.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.checkpoint import RandomWeights
from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.model.config import ModelConfig
from model_service.model.weights.conversion.write_meta import write_meta

Case = dict[str, Any]


@pytest.fixture(scope="session")
def cuda_engine(make_engine: Callable[..., Engine]) -> Callable[..., Engine]:
    """Makes one as `make_engine` does, on the device."""
    device = os.environ.get("CUDA_TESTS_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA: PyTorch finds no device")

    def make(name: str = "gqa-mp1", **changes: Any) -> Engine:
        if device == "cpu" and changes.get("dtype") == "float16":
            pytest.skip("the CPU serves no float16")
        return make_engine(name, device=device, **changes)

    return make


@pytest.fixture(scope="session")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with Llama 2's heads of 128, which the golden checkpoints do not have."""
    config = ModelConfig(
        dim=512, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=32
    )
    folder = tmp_path_factory.mktemp("wide-heads")
    write_meta(RandomWeights(config), folder)
    return folder


@pytest.fixture(scope="session")
def differences() -> Callable[[dict[Any, Any], list[Case]], list[str]]:
    """Ids of the cases whose tokens or logprobs are not those of Meta's code."""

    def found(answers: dict[Any, Any], cases: list[Case]) -> list[str]:
        return [
            case["id"]
            for case in cases
            if answers[case["id"]].ids != case["ids"]
            or answers[case["id"]].logprobs != pytest.approx(case["logprobs"], abs=1e-4)
        ]

    return found


@pytest.fixture(scope="session")
def shortfalls(make_engine: Any, run: Any) -> Callable[[Path, dict[Any, tuple[int, ...]]], Any]:
    """How much lower than the best logprob that of each token of some texts is, by id.

    By float32 on the CPU, which the golden cases hold to Meta's answers.
    """

    def found(folder: Path, texts: dict[Any, tuple[int, ...]]) -> dict[Any, list[float]]:
        engine = make_engine(folder.name, folder=folder.parent, max_batch_size=16)
        falls: dict[Any, list[float]] = {each: [] for each in texts}
        for each, text in texts.items():
            request = GenerationRequest(
                each,
                text,
                max_gen_len=0,
                sampling=SamplingParams(temperature=0.0),
                logprobs=True,
                prompt_logprobs=True,
                top_logprobs=1,
            )
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                tops = (entry.top[0][1] - entry.logprob for entry in output.logprobs if entry.top)
                falls[output.request_id] += tops
        return falls

    return found


@pytest.fixture(scope="session")
def scoring_request(request_for: Any) -> Callable[[Case], Any]:
    """Asks for the logprobs of a case's whole text, so that no token depends on the last one."""

    def make(case: Case) -> Any:
        text = case["ids"] if case["args"].get("echo") else case["prompt_ids"] + case["ids"]
        return request_for(case, prompt_ids=tuple(text), max_gen_len=0, prompt_logprobs=True)

    return make
