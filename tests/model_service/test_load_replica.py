import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import Precision
from model_service.model.config import ModelConfig
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from serving.errors import StartError


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


LLAMA_2 = {
    "7B": ModelConfig(dim=4096, n_heads=32, vocab_size=32000),
    "13B": ModelConfig(dim=5120, n_heads=40, vocab_size=32000),
    "70B": ModelConfig(
        dim=8192,
        n_heads=64,
        n_kv_heads=8,
        multiple_of=4096,
        ffn_dim_multiplier=1.3,
        vocab_size=32000,
    ),
}


def test_the_numbers_of_shards_are_those_that_divide_all_sizes() -> None:
    counts = {name: config.shard_counts() for name, config in LLAMA_2.items()}
    assert counts == {"7B": [1, 2, 4, 8, 16, 32], "13B": [1, 2, 4, 8], "70B": [1, 2, 4, 8]}
    for config in LLAMA_2.values():
        divisors = [n for n in range(1, 65) if not config.indivisible_by(n)]
        assert divisors == config.shard_counts()
    # It divides the heads and the width, yet not the feed-forward layer's.
    assert LLAMA_2["13B"].indivisible_by(5) == ["hidden_dim 13824"]


def test_other_kernels_have_another_fingerprint(
    options: ReplicaOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load_replica(options).info
    monkeypatch.setattr(
        "model_service.loading.replica.instructions", lambda: "of another processor"
    )
    other = load_replica(options).info
    assert other.fingerprint != own.fingerprint
    assert other.device == "cpu (of another processor)"


@pytest.mark.parametrize(("lookahead", "expected"), [("auto", False), ("on", True), ("off", False)])
def test_lookahead_is_off_on_the_cpu_unless_asked_for(
    options: ReplicaOptions, lookahead: Any, expected: bool
) -> None:
    replica = load_replica(dataclasses.replace(options, lookahead=lookahead))
    assert replica.limits.lookahead is expected


@pytest.mark.parametrize(
    ("own", "reason", "told"),
    [
        (True, "", "kernels: this package's, for "),
        (False, "they were not compiled", "without this package's own (they were not compiled)"),
        (False, "", "this package has none for float32"),
    ],
)
def test_the_log_says_which_kernels_compute(
    options: ReplicaOptions,
    own: bool,
    reason: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Precision, "uses_own_kernels", own)
    monkeypatch.setattr("model_service.loading.load_replica.without_kernels", lambda: reason)
    with caplog.at_level(logging.INFO):
        load_replica(options)
    assert told in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_tokens": 100}, "--kv_cache_tokens 100 is less than --max_seq_len 256"),
        ({"max_seq_len": 4097}, "was trained for at most 4096 tokens. To fix: lower --max_seq"),
        ({"dtype": "float16"}, "--dtype float16 needs --device cuda"),
        ({"ckpt_dir": Path("nowhere")}, "nowhere: not found. To fix: name a folder"),
    ],
)
def test_what_cannot_run_is_refused(
    options: ReplicaOptions, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartError, match=message):
        load_replica(dataclasses.replace(options, **{"max_seq_len": 256, **changes}))
