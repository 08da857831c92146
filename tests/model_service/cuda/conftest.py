"""Engines on a CUDA device; all tests here are skipped where there is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_service.engine.engine import Engine

Case = dict[str, Any]


@pytest.fixture(scope="session")
def cuda_engine(make_engine: Callable[..., Engine]) -> Callable[..., Engine]:
    """Makes one as `make_engine` does, on the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: PyTorch finds no device")

    def make(name: str = "gqa-mp1", **changes: Any) -> Engine:
        return make_engine(name, device="cuda", **changes)

    return make


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
def scoring_request(request_for: Any) -> Callable[[Case], Any]:
    """Asks for the logprobs of a case's whole text, so that no token depends on the last one."""

    def make(case: Case) -> Any:
        text = case["ids"] if case["args"].get("echo") else case["prompt_ids"] + case["ids"]
        return request_for(case, prompt_ids=tuple(text), max_gen_len=0, prompt_logprobs=True)

    return make
