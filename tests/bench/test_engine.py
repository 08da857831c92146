import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench.engine.__main__ import main
from bench.engine.arrivals import NEAREST, host, over_decode_only
from bench.engine.driver import Job, Load, Step, Trial, loaded
from bench.engine.parts import Stopwatch, step_parts
from bench.engine.roofline import Rates, measure_rates
from bench.engine.throughput import Loaded, decode
from bench.shapes import SHAPES
from model_service.model.cpu.library import find_library
from model_service.model.graphs.step_graphs import StepGraphs


def run(folder: Path, work_dir: Path, *arguments: str) -> dict[str, Any]:
    """The result of a command on the tiny shape."""
    small = ["--device", "cpu", "--sizes", "tiny", "--shapes", "tiny"]
    main([*small, "--work_dir", str(work_dir), "--results", str(folder), *arguments])
    (file,) = folder.glob("*/engine/tiny/result.json")
    return dict(json.loads(file.read_text()))


@pytest.mark.thorough
def test_cases_of_a_gpu_run_on_the_cpu(tmp_path: Path, work_dir: Path) -> None:
    cases = ["one_stream", "batch", "prefill", "first_token", "crowd", "profile"]
    pairs = ["invariance", "formats", "blocks"]
    found = run(tmp_path, work_dir, "--precisions", "float32", "--cases", *cases, *pairs)
    assert found["notes"] == []
    names = dict.fromkeys(row["case"] for row in found["rows"])
    traced = ["device idle", "kernels", "gaps"]
    assert list(names) == [*cases[:4], "crowd", *traced, "device", *pairs]
    modes = [row["settings"] for row in found["rows"] if row["case"] == "invariance"]
    asked = [(1, "default"), (1, "batch_invariant"), (3, "default"), (3, "batch_invariant")]
    assert [(each["streams"], each["variant"]) for each in modes] == asked
    formats = [row["settings"]["variant"] for row in found["rows"] if row["case"] == "formats"]
    assert formats == ["float32", "int8", "int4", "fp8", "fp8 cache"]


@pytest.mark.thorough
def test_cases_of_the_cpu_write_a_result(tmp_path: Path, work_dir: Path) -> None:
    cases = ["decode", "context", "load", "dialog", "stall", "kv_cache", "shards"]
    found = run(tmp_path, work_dir, "--precisions", "float32", "--cases", *cases)
    assert found["notes"] == []
    rows = found["rows"]
    assert set(cases) <= {row["case"] for row in rows}
    (load,) = (row["values"] for row in rows if row["case"] == "load")
    assert load["peak_gb"] >= load["kept_gb"] > 0
    assert load["step_ms"] > 0
    turns = [row["settings"]["turn"] for row in rows if row["case"] == "dialog"]
    assert turns[:10] == list(range(1, 11))
    assert max(row["settings"].get("shards", 0) for row in rows) > 1
    assert (tmp_path / next(iter(tmp_path.iterdir())) / "engine/tiny/result.md").exists()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_parts_of_a_step_are_its_products_and_the_code_around_them(job: Job, weights: str) -> None:
    if isinstance(find_library(), str):
        pytest.skip(f"needs the compiled kernels: {find_library()}")
    dtype = "float32" if weights == "float32" else "bfloat16"
    with loaded(replace(job, dtype=dtype, precision=weights)) as driver:
        engine = Loaded(job, driver, lambda: Rates(1.0, 1.0, {}), rounds=1)
        whole, *parts = step_parts(engine, Load(2, 8, 20), steps=3)
    calls = {str(row.settings["function"]).strip("`"): row.values["calls"] for row in parts}
    in_c = sum(cast("float", n) for name, n in calls.items() if name.startswith("C: "))
    assert in_c >= 1
    assert {"Python: engine", "Python: forward pass", "Python: sampling"} < calls.keys()
    products, step = (cast("float", whole.values[name]) for name in ("products_ms", "step_ms"))
    assert 0 < products < step


def test_time_of_a_call_is_counted_without_the_calls_inside() -> None:
    watch = Stopwatch()
    inner = watch.timed("inner", lambda: sum(range(10**5)))
    started = time.perf_counter()
    watch.timed("outer", lambda: [inner() for _ in range(3)])()
    taken = time.perf_counter() - started
    assert watch.calls == {"inner": 3, "outer": 1}
    assert 0 < watch.seconds["outer"] < taken - watch.seconds["inner"]


class NoGraph:
    """Serves no step, so each is computed plainly."""

    max_tokens = 512

    def forward(self, *_: object) -> None:
        return None


def test_launches_in_pieces_stand_beside_those_kernel_by_kernel(job: Job) -> None:
    with loaded(job) as driver:
        none: Any = NoGraph()
        timed: Any = driver.engine._runner
        timed._runner.graphs = StepGraphs(none, none)
        engine = Loaded(job, driver, lambda: Rates(1.0, 1.0, {}), rounds=1)
        rows = [row.settings for row in host(engine, Load(3, 8, 24))]
        assert timed.graphs.piecewise is none
    kinds = [(row["prompt_tokens"], row["in_pieces"]) for row in rows]
    assert kinds == [(False, False), (True, True), (True, False)]


def test_streams_of_a_decode_step_all_advance(job: Job) -> None:
    with loaded(job) as driver:
        contexts = driver.fill(driver.prompts([8] * 3), [40] * 3)
        assert min(contexts.values()) >= 9
        step = driver.step()
        assert list(step.tokens.values()) == [1, 1, 1]
        assert step.forward > 0
        driver.cancel(next(iter(contexts)))
        driver.clear()
        load = driver.engine.load()
        assert (load.running_sequences, load.free_blocks) == (0, load.total_blocks)


def test_answers_too_short_for_all_to_run_at_once_are_told(job: Job) -> None:
    short = job.sized(3, 40, max_step_tokens=16)
    with loaded(short) as driver, pytest.raises(RuntimeError, match="longer answers"):
        driver.fill(driver.prompts([32] * 3), [3] * 3)
    with loaded(short) as driver, pytest.raises(RuntimeError, match="longer answers"):
        driver.answer(driver.prompts([32] * 3), 2).all_decode()


def test_greedy_answer_falls_short_of_nothing(job: Job) -> None:
    with loaded(job) as driver:
        (prompt,) = driver.prompts([8])
        (request,) = driver.answer([prompt], 6).prompts
        answer = tuple(driver.answers[request])
        assert max(driver.shortfalls(prompt, answer)) < 1e-4
        wrong = tuple((token + 1) % 512 for token in answer)
        assert min(driver.shortfalls(prompt, wrong)) > 0.01


def test_decode_row_states_rate_and_share_of_the_limit(job: Job) -> None:
    with loaded(job) as driver:
        device = torch.device("cpu")
        engine = Loaded(job, driver, lambda: measure_rates(device, "float32"), rounds=1)
        row = decode("decode", engine, Load(4, 8, 5))
    assert row.settings["streams"] == 4
    rate, share = row.values["tokens_per_s"], row.values["share_of_limit"]
    assert isinstance(rate, float)
    assert isinstance(share, float)
    assert rate > 0
    assert share > 0


def test_a_batch_is_seen_from_its_first_prompt_to_its_last_token(job: Job) -> None:
    with loaded(job) as driver:
        trial = driver.answer(driver.prompts([8, 8, 8]), 6)
    assert [len(times) for times in trial.arrivals()] == [6, 6, 6]
    works = trial.works()
    assert sum(work.tokens for work in works) == 3 * (8 + 5)
    assert all(work.tokens == 3 for work in works[trial.all_decode()])
    assert sum(trial.seconds()) == pytest.approx(trial.steps[-1].ended - trial.started)


def test_contexts_grow_with_the_answer() -> None:
    steps = [Step(1.0, {}, 4), Step(2.0, {7: 1}, 4), Step(3.0, {7: 1}, 0), Step(4.0, {7: 1}, 0)]
    trial = Trial({7: 8}, 0.0, steps)
    assert [work.context for work in trial.works()] == [0, 0, 9, 10]
    assert [work.tokens for work in trial.works()] == [4, 4, 1, 1]
    assert trial.decode_rate() == 1.0
    network = Job(SHAPES["tiny"], "float32", torch.device("cpu")).network
    cached = network.bytes(trial.works()[2]) + network.bytes(trial.works()[3])
    assert trial.decode_bandwidth(network) == cached / 2


def test_a_machine_that_slows_down_makes_no_stall() -> None:
    """Steps with prompt tokens need twice as long as others; later all need three times that."""
    fast = [(0, 1.0)] * 8 + [(13, 2.0), (13, 2.0), (0, 1.0)] * 8
    slow = [(tokens, 3 * seconds) for tokens, seconds in fast]
    ratios = over_decode_only(fast + slow)
    settled = ratios[: len(fast) - NEAREST] + ratios[len(fast) + NEAREST :]
    assert set(settled) == {1.0, 2.0}


def test_one_strange_step_stands_out() -> None:
    steps = [(0, 1.0)] * 5 + [(13, 2.0), (0, 1.0), (13, 9.0), (0, 7.0), (13, 2.0)]
    assert max(over_decode_only(steps)) == pytest.approx(9.0)
