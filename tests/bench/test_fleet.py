from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.baselines.fleet import Fleet, WorkerError
from tests.bench.conftest import MakeSpec


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Has memory for two workers of make_spec."""
    with Fleet(250, tmp_path, cores=1) as opened:
        yield opened


def test_worker_answers_what_it_was_asked(fleet: Fleet, make_spec: MakeSpec) -> None:
    spec = make_spec("one")
    assert fleet.call(spec, "prefill", prompt=[5]) == [5.0]
    assert fleet.call(spec, "decode", prompts=[[3, 4]], steps=3) == [7.0] * 3
    assert fleet.call(spec, "greedy", prompt=[7, 8, 9], count=2) == [7, 8]


def test_worker_stays_loaded_while_there_is_memory(fleet: Fleet, make_spec: MakeSpec) -> None:
    one, two = make_spec("one"), make_spec("two")
    first = fleet.info(one)
    assert fleet.info(two) != first
    assert fleet.info(one) == first


def test_worker_not_called_for_longest_makes_room(fleet: Fleet, make_spec: MakeSpec) -> None:
    specs = [make_spec(name) for name in ("one", "two", "three")]
    first, second, _ = [fleet.info(spec) for spec in specs]
    assert fleet.info(specs[1]) == second
    assert fleet.info(specs[0]) != first


def test_all_workers_but_the_one_that_is_asked_are_stopped(
    fleet: Fleet, make_spec: MakeSpec
) -> None:
    specs = [make_spec("one"), make_spec("two")]
    for spec in (*specs, specs[0]):
        assert fleet.call(spec, "prefill", prompt=[5]) == [5.0]
    for spec in specs:
        status = Path(f"/proc/{fleet.info(spec)['process']}/status").read_text()
        assert "State:\tT (stopped)" in status


def test_stopped_worker_ends_when_asked_to(fleet: Fleet, make_spec: MakeSpec) -> None:
    spec = make_spec("one")
    process = fleet.info(spec)["process"]
    fleet.stop("one")
    assert not Path(f"/proc/{process}").exists()


def test_new_process_is_to_be_warmed_up_again(fleet: Fleet, make_spec: MakeSpec) -> None:
    spec = make_spec("one")
    assert [fleet.warmed(spec, "decode-1") for _ in range(2)] == [False, True]
    fleet.stop("one")
    assert not fleet.warmed(spec, "decode-1")


def test_error_of_a_worker_is_reported_with_its_message(fleet: Fleet, make_spec: MakeSpec) -> None:
    with pytest.raises(WorkerError, match="prefill: RuntimeError: out of tokens"):
        fleet.call(make_spec("one"), "prefill", prompt=[])
    with pytest.raises(WorkerError, match="load: ValueError: precision unknown"):
        fleet.info(make_spec("two", precision="unknown"))


def test_death_of_a_worker_is_reported_with_its_last_words(
    fleet: Fleet, make_spec: MakeSpec
) -> None:
    with pytest.raises(WorkerError, match="greedy: ended, libraries print to stdout"):
        fleet.call(make_spec("one"), "greedy", prompt=[], count=1)
    assert fleet.call(make_spec("one"), "prefill", prompt=[5]) == [5.0]


def test_worker_that_cannot_load_leaves_no_process(fleet: Fleet, make_spec: MakeSpec) -> None:
    spec = make_spec("one", precision="unknown")
    for _ in range(2):
        with pytest.raises(WorkerError):
            fleet.info(spec)
