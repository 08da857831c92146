"""The tiny shape on disk, and workers to start."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.baselines.comparison import Plan
from bench.baselines.environments import own_environment
from bench.baselines.fleet import Post
from bench.baselines.rounds import parse_case
from bench.checkpoint import ensure_checkpoint
from bench.engine.session import Variant
from bench.host import read_host
from bench.shapes import SHAPES

MakePost = Callable[..., Post]


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def tiny(work_dir: Path) -> Path:
    """The tiny shape's checkpoint."""
    return ensure_checkpoint(SHAPES["tiny"], work_dir)


@pytest.fixture(scope="session")
def variant(tiny: Path) -> Variant:
    return Variant(tiny, "float32", threads=1)


@pytest.fixture
def plan(tiny: Path, work_dir: Path) -> Plan:
    """A comparison small enough for a test."""
    return Plan(
        shape=SHAPES["tiny"],
        ckpt_dir=tiny,
        work_dir=work_dir,
        host=dataclasses.replace(read_host(), cores=1, features=("avx2",)),
        cases=(parse_case("prefill-32"), parse_case("decode-2")),
        rounds=2,
        context=8,
        steps=2,
        memory=2**32,
    )


@pytest.fixture
def make_post() -> MakePost:
    """A post for the worker in echo_worker.py."""

    def make(name: str, **changes: Any) -> Post:
        job = {
            "model": name,
            "precision": "float32",
            "threads": 1,
            "sequences": 1,
            "length": 1,
            "tokens": 1,
            "options": {},
        }
        return Post(name, "tests.bench.echo_worker", own_environment(), job | changes, bytes=100)

    return make
