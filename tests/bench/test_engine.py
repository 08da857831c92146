import json
from pathlib import Path

import pytest

from bench.engine import shards
from bench.engine.__main__ import main
from bench.engine.session import Variant, session
from bench.engine.throughput import decode, weight_bytes
from bench.shapes import SHAPES


def test_streams_of_a_decode_step_all_advance(variant: Variant) -> None:
    with session(variant.options(3, 24)) as run:
        run.fill(run.prompts(3, 8), 12)
        step = run.step()
        assert list(step.tokens.values()) == [1, 1, 1]
        assert 0 < step.forward < step.seconds
        run.clear()
        load = run.engine.load()
        assert load.running_sequences == load.waiting_sequences == 0


def test_answers_too_short_for_all_to_run_at_once_are_told(variant: Variant) -> None:
    with (
        session(variant.options(3, 40, settings={"max_step_tokens": 16})) as run,
        pytest.raises(RuntimeError, match="longer answers"),
    ):
        run.fill(run.prompts(3, 32), 3)


def test_greedy_answer_falls_short_of_nothing(variant: Variant) -> None:
    with session(variant.options(1, 32)) as run:
        prompt = run.prompt(8)
        request = run.add(prompt, 6)
        while run.engine.has_work:
            run.step()
        answer = run.answers[request]
        assert max(run.shortfalls(prompt, answer)) < 1e-4
        wrong = tuple((token + 1) % 512 for token in answer)
        assert min(run.shortfalls(prompt, wrong)) > 0.01


def test_decode_limit_counts_the_weights_that_a_step_reads() -> None:
    shape = SHAPES["110M"]
    matrices = shape.parameters - 32000 * 768
    assert weight_bytes(shape, "float32") == 4 * matrices
    assert weight_bytes(shape, "int4") == matrices // 2


def test_decode_row_states_rate_and_share_of_the_limit(variant: Variant) -> None:
    streams = 24  # whose prompts are more than a step takes by default
    (row,) = decode(SHAPES["tiny"], variant, [streams], context=32, steps=2, rounds=1)
    assert row.settings == {"precision": "float32", "streams": streams, "context": 32}
    rate, step = row.values["tokens_per_s"], row.values["step_ms"]
    assert isinstance(rate, float)
    assert isinstance(step, float)
    assert rate * step == pytest.approx(1000 * streams, rel=0.01)


def test_shards_run_in_processes_of_their_own(variant: Variant) -> None:
    (row,) = shards.shard_sweep(variant, [2], batch=2, context=8, steps=2)
    assert row.settings["shards"] == 2


def test_command_writes_a_result(work_dir: Path, tiny: Path, tmp_path: Path) -> None:
    sizes = ["--rounds", "1", "--prompt", "64", "--long_prompt", "128", "--threads", "1"]
    cases = ["--cases", "load", "prefill", "dialog", "stall", "kv_cache"]
    folders = ["--work_dir", str(work_dir), "--results", str(tmp_path), "--no-plots"]
    main(["--shapes", "tiny", "--precisions", "float32", *sizes, *cases, *folders])
    (file,) = tmp_path.glob("*/engine/tiny/result.json")
    rows = json.loads(file.read_text())["rows"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == cases[1:]
    turns = [row["settings"]["turn"] for row in rows if row["case"] == "dialog"]
    assert turns[:10] == list(range(1, 11))
