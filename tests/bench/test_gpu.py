import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.engine.driver import Driver, Job, Passage, Step, loaded
from bench.gpu.__main__ import main
from bench.gpu.recorder import Recorder, SkippedError
from bench.gpu.sizes import SMALL
from bench.gpu.targets import against_targets
from bench.gpu.weights import RandomWeights
from bench.report import Row
from bench.shapes import SHAPES

TINY = SHAPES["tiny"]


@pytest.fixture
def driver() -> Iterator[Driver]:
    job = Job(TINY, "float32", torch.device("cpu"), 4, 64, 256, step_tokens=64)
    with loaded(job) as opened:
        yield opened


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path, {"device": "NVIDIA H200", "shape": "tiny"}, deadline=float("inf"))


def result(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*/gpu/result.json")
    return dict(json.loads(file.read_text()))


def test_every_case_runs_on_the_cpu_or_says_why_not(tmp_path: Path, work_dir: Path) -> None:
    folders = ["--work_dir", str(work_dir), "--results", str(tmp_path)]
    main(["--device", "cpu", "--shape", "tiny", *folders])
    found = result(tmp_path)
    cases = dict.fromkeys(row["case"] for row in found["rows"])
    assert list(cases)[:5] == ["card", "one stream", "batch", "prefill", "first token"]
    assert {"device idle", "kernels", "gaps", "crowd", "load", "service", "day"} <= cases.keys()
    assert {"13B: skipped: needs CUDA", "70B: skipped: needs CUDA"} <= set(found["notes"])
    (folder,) = tmp_path.glob("*/gpu")
    assert {file.name for file in folder.iterdir()} == {"day.png", "result.json", "result.md"}


def test_a_batch_is_seen_from_its_first_prompt_to_its_last_token(driver: Driver) -> None:
    passage = driver.answer(driver.prompts([8, 8, 8]), 6)
    assert [len(times) for times in passage.arrivals()] == [6, 6, 6]
    works = passage.works()
    assert sum(work.tokens for work in works) == 3 * (8 + 5)
    assert all(work.tokens == 3 for work in works[passage.all_decode()])
    assert sum(passage.seconds()) == pytest.approx(passage.steps[-1].ended - passage.started)


def test_contexts_grow_with_the_answer() -> None:
    steps = [Step(1.0, {}, 4), Step(2.0, {7: 1}, 4), Step(3.0, {7: 1}, 0), Step(4.0, {7: 1}, 0)]
    works = Passage({7: 8}, 0.0, steps).works()
    assert [work.context for work in works] == [0, 0, 9, 10]
    assert [work.tokens for work in works] == [4, 4, 1, 1]


def test_a_cancelled_request_makes_room(driver: Driver) -> None:
    contexts = driver.fill(driver.prompts([8] * 4), [40] * 4)
    assert min(contexts.values()) >= 9
    driver.cancel(next(iter(contexts)))
    driver.clear()
    load = driver.engine.load()
    assert (load.running_sequences, load.free_blocks) == (0, load.total_blocks)


@pytest.mark.parametrize("shards", [1, 2])
def test_random_shards_join_to_the_whole(shards: int) -> None:
    source = RandomWeights(TINY.config)
    whole = dict(source.read_shard(0, 1, torch.float32, torch.device("cpu")))
    parts = [
        dict(source.read_shard(rank, shards, torch.float32, torch.device("cpu")))
        for rank in range(shards)
    ]
    name = "layers.1.feed_forward.w2.weight"
    assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole[name])
    assert sum(weight.numel() for weight in parts[0].values()) == source.shard_parameters(shards)
    assert source.parameters == TINY.parameters


def test_a_failing_case_is_noted_and_keeps_what_it_had(recorder: Recorder, tmp_path: Path) -> None:
    def failing() -> Iterator[Row]:
        yield Row("first", {}, {"value": 1.0})
        raise RuntimeError("out of memory\nand so on")

    assert not recorder.attempt("some", failing)
    assert recorder.failed
    found = result(tmp_path)
    assert [row["case"] for row in found["rows"]] == ["first"]
    assert found["notes"] == ["some: failed: RuntimeError: out of memory"]
    assert next(tmp_path.iterdir()).name.endswith("-nvidia-h200")


def test_a_case_that_cannot_be_measured_is_no_failure(recorder: Recorder, tmp_path: Path) -> None:
    def skipped() -> Iterator[Row]:
        raise SkippedError("needs CUDA")

    assert not recorder.attempt("some", skipped)
    assert not recorder.failed
    assert result(tmp_path)["notes"] == ["some: skipped: needs CUDA"]


def test_no_case_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    late = Recorder(tmp_path, {"device": "cpu", "shape": "tiny"}, deadline=0.0)
    assert not late.attempt("some", lambda: pytest.fail("begun"))
    assert "not begun" in result(tmp_path)["notes"][0]


def test_targets_are_judged_on_rows_of_their_own_shape() -> None:
    values = {"share_of_copy_bandwidth": 0.8}
    rows = [
        Row("one stream", {"shape": "7B", "weights": "bfloat16"}, values),
        Row("one stream", {"shape": "70B", "weights": "int8"}, values),
        Row("one stream", {"shape": "tiny", "weights": "float32"}, values),
        Row("device idle", {"streams": 1}, {"between_steps_percent": 2.0}),
    ]
    judged = [(row.values["target"], row.values["met"]) for row in against_targets(rows)]
    assert judged == [("≥ 0.85", "no"), ("≤ 3", "yes"), ("≥ 0.75", "yes")]


def test_sizes_hold_their_longest_sequences() -> None:
    assert SMALL.length >= SMALL.prompt + SMALL.answer
    assert SMALL.tokens >= SMALL.length
