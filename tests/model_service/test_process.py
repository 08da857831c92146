"""The model service as a process, and as the processes of several shards."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from llama.v1 import model_pb2, model_pb2_grpc, sampling_pb2

Start = Callable[..., "Process"]
NAME = "llama.v1.ModelService"


class Process:
    """A model service that was started here, and its log."""

    def __init__(self, shards: int, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "model_service", "--shards", str(shards)]
        self.popen = subprocess.Popen(
            [*command, "--port", "0", "--log_format", "json", *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        """The log entry of `event`; fails when the process ends without it."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)
            if line.startswith("{") and (entry := json.loads(line))["event"].startswith(event):
                return dict(entry)
        raise AssertionError(f"no {event!r} in the log:\n{''.join(self.lines)}")

    def serving(self) -> grpc.Channel:
        """A channel, once the service is healthy."""
        target = grpc.insecure_channel(self.wait_for("listening")["address"])
        request = health_pb2.HealthCheckRequest(service=NAME)
        watch = target.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        for response in watch(request, timeout=60):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                break
        return target

    def end(self) -> tuple[int, str]:
        """Exit status, and all that was logged."""
        assert self.popen.stderr is not None
        rest = self.popen.stderr.read()
        return self.popen.wait(timeout=60), "".join(self.lines) + rest


@pytest.fixture
def launch(golden: Path) -> Iterator[Start]:
    started: list[Process] = []

    def launch(*arguments: str, shards: int = 1, checkpoint: str = "gqa-mp1") -> Process:
        folder = str(golden / "checkpoints" / checkpoint)
        process = Process(shards, ["--ckpt_dir", folder, "--max_seq_len", "256", *arguments])
        started.append(process)
        return process

    yield launch
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            launched = psutil.Process(process.popen.pid)
            for each in (*launched.children(recursive=True), launched):
                each.kill()
        process.popen.wait(timeout=30)


def generate(
    target: grpc.Channel, case: dict[str, Any], **sampling: Any
) -> Iterator[model_pb2.TokenEvent]:
    start = model_pb2.StartSequence(
        sequence_id="a",
        prompt_ids=case["prompt_ids"],
        sampling=sampling_pb2.SamplingParams(**{"temperature": 0, "max_gen_len": 32, **sampling}),
        eos_ids=[2],
    )
    requests = iter([model_pb2.GenerateRequest(start=start)])
    for response in model_pb2_grpc.ModelServiceStub(target).Generate(requests, timeout=60):
        yield from response.events


@pytest.mark.parametrize(("shards", "checkpoint"), [(1, "gqa-mp2"), (2, "gqa-mp1")])
def test_shards_answer_and_sigterm_lets_a_stream_finish(
    launch: Start, cases: Any, shards: int, checkpoint: str
) -> None:
    process = launch(shards=shards, checkpoint=checkpoint)
    case = cases("gqa")[0]
    events = generate(process.serving(), case)
    ids = list(next(events).ids)
    process.popen.send_signal(signal.SIGTERM)
    assert ids + [token for event in events for token in event.ids] == case["ids"]
    status, log = process.end()
    assert status == 0
    assert '"event": "stopped"' in log


def shard(process: Process, rank: int) -> psutil.Process:
    children = psutil.Process(process.popen.pid).children()
    [found] = [each for each in children if each.environ().get("RANK") == str(rank)]
    return found


def test_a_shard_that_dies_ends_the_replica_and_the_log_names_it(launch: Start, cases: Any) -> None:
    process = launch(shards=2)
    events = generate(process.serving(), cases("gqa")[0], ignore_eos=True, max_gen_len=200)
    next(events)
    follower = shard(process, 1)
    follower.kill()
    with pytest.raises(grpc.RpcError) as error:
        list(events)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    status, log = process.end()
    assert status == 1
    assert f"lost a shard: rank 1 (pid {follower.pid}) is gone" in log
    assert f"rank 1 (pid {follower.pid}) was killed by SIGKILL" in log


def test_a_shard_that_hangs_ends_the_replica_within_the_bound(launch: Start, cases: Any) -> None:
    process = launch("--shard_timeout=10", shards=2)
    events = generate(process.serving(), cases("gqa")[0], ignore_eos=True, max_gen_len=200)
    next(events)
    follower = shard(process, 1)
    follower.suspend()
    with pytest.raises(grpc.RpcError) as error:
        list(events)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert process.wait_for(f"lost a shard: rank 1 (pid {follower.pid}) is stopped")
    assert process.end()[0] == 1
    assert not follower.is_running()


def test_what_was_found_and_what_it_needs_is_logged_before_it_is_allocated(launch: Start) -> None:
    process = launch(checkpoint="gqa-mp2")
    process.wait_for("listening")
    assert (
        "gqa-mp2: 238K, 2 files, float32, 1 shard, weights 0.9 MiB, "
        "KV cache 24.0 MiB = 32,768 tokens" in process.lines[0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv_cache_tokens", "9000000000"], "To fix: lower --kv_cache_tokens"),
        (["--tokenizer_path", "nowhere"], "cannot read nowhere: No such file"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    launch: Start, arguments: list[str], message: str
) -> None:
    status, log = launch(*arguments).end()
    assert status == 1
    assert message in log
    assert "Traceback" not in log


def test_shards_that_do_not_divide_the_sizes_are_refused(launch: Start) -> None:
    status, log = launch(shards=3).end()
    assert status == 1
    told = "3 shards do not divide n_heads 8, n_kv_heads 4, dim 64, hidden_dim 224"
    assert log.count(told) == 1
    assert "start one of these numbers of shards: 1, 2, 4" in log


def test_shards_that_contradict_torchrun_are_refused(
    launch: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, log = launch(shards=3).end()
    assert status == 1
    assert "is 3, but torchrun has started 2 processes: leave --shards out, or torchrun" in log


def test_help_lists_flags_and_variables() -> None:
    command = [sys.executable, "-m", "model_service", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--ckpt_dir", "--max_batch_size", "CHASQUI_CKPT_DIR", "CHASQUI_DTYPE"):
        assert flag in text
