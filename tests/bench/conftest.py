"""The tiny shape on disk, and workers to start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.baselines.environments import Environment
from bench.baselines.fleet import WorkerSpec
from bench.checkpoint import ensure_checkpoint
from bench.engine import roofline
from bench.engine.driver import Job
from bench.engine.roofline import Effort
from bench.shapes import SHAPES

MakeSpec = Callable[..., WorkerSpec]


@pytest.fixture(autouse=True)
def small_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures this machine's rates on little data: a test needs them to be there, not exact."""
    monkeypatch.setitem(roofline.EFFORTS, "cpu", Effort(2**22, 64, 0.001))


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def tiny(work_dir: Path) -> Path:
    """The tiny shape's checkpoint."""
    return ensure_checkpoint(SHAPES["tiny"], work_dir)


@pytest.fixture
def job(tiny: Path) -> Job:
    """An engine of four sequences on the tiny shape."""
    wanted = Job(SHAPES["tiny"], "float32", torch.device("cpu"), ckpt_dir=tiny)
    return wanted.sized(4, 64, threads=1)


@pytest.fixture
def make_spec() -> MakeSpec:
    """How to start the worker in echo_worker.py."""

    def make(name: str, **changes: Any) -> WorkerSpec:
        job = {
            "model": name,
            "precision": "float32",
            "device": "cpu",
            "threads": 1,
            "sequences": 1,
            "length": 1,
            "tokens": 1,
            "options": {},
        }
        return WorkerSpec(name, "tests.bench.echo_worker", Environment(), job | changes, bytes=100)

    return make
