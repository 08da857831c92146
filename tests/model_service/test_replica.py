import dataclasses
from pathlib import Path
from typing import Any

import pytest

from model_service.model.checkpoint import open_checkpoint
from model_service.replica import ReplicaOptions, load_replica


@pytest.fixture
def options(golden: Path) -> ReplicaOptions:
    folder = golden / "checkpoints" / "gqa-mp2"
    return ReplicaOptions(folder, max_seq_len=256, dtype="float32", device="cpu")


def test_weights_may_come_from_elsewhere(
    options: ReplicaOptions,
    tmp_path: Path,
    make_engine: Any,
    cases: Any,
    request_for: Any,
    run: Any,
) -> None:
    source = open_checkpoint(options.ckpt_dir)
    replica = load_replica(dataclasses.replace(options, ckpt_dir=tmp_path / "random"), source)
    requests = [request_for(case) for case in cases("gqa")[:2]]
    assert run(replica.engine(), requests) == run(make_engine("gqa-mp2"), requests)
    assert replica.info.name == "random"
    assert replica.info.fingerprint == load_replica(options).info.fingerprint


def test_other_kernels_have_another_fingerprint(
    options: ReplicaOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load_replica(options).info
    monkeypatch.setattr("model_service.replica.instructions", lambda: "of another processor")
    other = load_replica(options).info
    assert other.fingerprint != own.fingerprint
    assert other.device == "cpu (of another processor)"


@pytest.mark.parametrize(("lookahead", "expected"), [("auto", False), ("on", True), ("off", False)])
def test_lookahead_is_off_on_the_cpu_unless_asked_for(
    options: ReplicaOptions, lookahead: str, expected: bool
) -> None:
    replica = load_replica(dataclasses.replace(options, lookahead=lookahead))
    assert replica.limits.lookahead is expected
