"""`chasqui bench` as its users run it, against all services on a golden checkpoint."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from chasqui.cli.main import main
from llama.v1 import chat_pb2

Run = Callable[..., Any]
Response = chat_pb2.TextCompleteStreamResponse
SMALL = ("--prompt_tokens", "uniform:4-12", "--answer_tokens", "6")
NOWHERE = "127.0.0.1:1"


def test_a_closed_loop_prints_a_table(run: Run, target: str) -> None:
    done = run("bench", "--target", target, "--concurrency=3", "--requests=9", *SMALL)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"gqa-mp1 at {target}, 3 at a time; prompts of uniform:4-12")
    assert "9 ok, 0 failed" in done.stdout
    for row in ("time to first token", "inter-token latency", "end-to-end latency"):
        numbers = done.stdout.partition(row)[2].partition("\n")[0].split()
        mean, p50, p90, p99, most = (float(number.replace(",", "")) for number in numbers)
        assert p50 <= p90 <= p99 <= most
        assert 0 < mean <= most


def test_the_document_holds_everything(run: Run, target: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    flags = ("--requests=5", "--warmup=2", "--seed=7", f"--json={file}")
    more = ("--timeout=inf", "--duration=inf", "--priority=-3")

    done = run("bench", "--target", target, *flags, *more, *SMALL)

    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["model"]["name"] == "gqa-mp1"
    assert found["settings"]["prompt_tokens"] == "uniform:4-12"
    assert (found["settings"]["timeout"], found["settings"]["priority"]) == (None, -3)
    assert (found["summary"]["succeeded"], found["summary"]["output_tokens"]) == (5, 30)
    assert found["client"]["cpu_share"] > 0
    # The warm-up took the first two.
    assert [request["index"] for request in found["requests"]] == [2, 3, 4, 5, 6]
    for request in found["requests"]:
        assert (request["status"], request["completion_tokens"]) == ("OK", 6)
        assert 4 <= request["prompt_tokens"] <= 12
        assert request["intended_ms"] <= request["sent_ms"] <= request["ended_ms"]


def test_an_open_loop_sends_at_its_rate(run: Run, target: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"

    done = run("bench", "--target", target, "--rate=40", "--duration=1", f"--json={file}", *SMALL)

    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    intended = [request["intended_ms"] for request in found["requests"]]
    assert intended == sorted(intended)
    assert 20 <= len(intended) <= 60
    assert intended[-1] < 1000
    assert (found["settings"]["rate"], found["settings"]["concurrency"]) == (40.0, None)


def test_dialogs_from_a_file_are_answered(run: Run, target: str, tmp_path: Path) -> None:
    dialogs, file = tmp_path / "dialogs.jsonl", tmp_path / "run.json"
    dialogs.write_text('[{"role": "user", "content": "Hello"}]\n')
    flags = ("--requests=3", "--answer_tokens=4", f"--dialogs={dialogs}", f"--json={file}")

    done = run("bench", "--target", target, *flags)

    assert done.returncode == 0, done.stderr
    answered = json.loads(file.read_text())["requests"]
    assert len({request["prompt_tokens"] for request in answered}) == 1
    assert all(request["completion_tokens"] <= 4 for request in answered)


def test_a_plot_is_written(run: Run, target: str, tmp_path: Path) -> None:
    picture = tmp_path / "run.png"

    done = run("bench", "--target", target, "--requests=4", f"--plot={picture}", *SMALL)

    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_a_full_queue_is_counted_and_not_fatal(
    run: Run, serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHASQUI_MAX_QUEUED_SEQUENCES", "1")
    monkeypatch.setenv("CHASQUI_MAX_DIALOGS", "1")
    flags = ("--concurrency=6", "--requests=8", "--answer_tokens=100")

    with serve() as (_, target):
        done = run("bench", "--target", target, *flags, f"--json={tmp_path / 'run.json'}")

    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run.json").read_text())["summary"]
    assert summary["succeeded"] >= 1
    assert summary["failures"]["RESOURCE_EXHAUSTED"]["count"] == 8 - summary["succeeded"] >= 5
    assert "× RESOURCE_EXHAUSTED, the first: the queue is full: 1 of 1" in done.stdout


def test_a_run_without_a_success_fails(run: Run, target: str) -> None:
    done = run("bench", "--target", target, "--requests=3", "--temperature=-1")

    assert done.returncode == 1
    assert "3 × INVALID_ARGUMENT, the first: sampling.temperature" in done.stdout
    assert done.stderr == "Error: none of 3 requests succeeded\n"


def test_ctrl_c_ends_the_run_and_reports_what_was_measured(spawn: Any, start_gateway: Any) -> None:
    third, cancelled = threading.Event(), threading.Event()
    begun: list[object] = []

    def answer(request: object, context: grpc.ServicerContext) -> Iterator[Response]:
        begun.append(request)
        if len(begun) > 2:
            context.add_callback(cancelled.set)
            third.set()
            cancelled.wait()
        usage = chat_pb2.Usage(completion_tokens=1)
        finished = chat_pb2.Finished(usage=usage)
        yield Response(event=chat_pb2.StreamEvent(finished=finished))

    def get_model(*_: object) -> chat_pb2.GetModelResponse:
        return chat_pb2.GetModelResponse(name="stub", context_length=256, vocab_size=100)

    target = start_gateway(TextCompleteStream=answer, GetModel=get_model)
    with spawn("bench", "--target", target, "--concurrency=1") as process:
        assert third.wait(60)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)

    assert process.returncode == 0, stderr
    assert "2 ok, 0 failed" in stdout
    assert "stopped by a signal; 1 unfinished requests are not counted" in stdout
    assert cancelled.wait(30)


def test_a_plot_without_the_extra_is_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed

    done = CliRunner().invoke(main, ["bench", "--target", NOWHERE, "--plot", "run.png"])

    assert done.exit_code == 1
    assert "--plot needs matplotlib: run pip install '.[bench]'" in done.output


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--rate=1", "--concurrency=1"), "closed loop and --rate an open one"),
        (("--rate=nan",), "must be a finite number"),
        (("--rate=inf",), "must be a finite number"),
        (("--timeout=nan",), "must be a number of seconds"),
        (("--dialogs=DIALOGS", "--shared_prefix=9"), "--shared_prefix is for random prompts"),
        (("--prompt_tokens=0",), "at least 1 token"),
        (("--answer_tokens=some",), "must be 128, uniform:"),
        (("--json=no/such/folder.json",), "there is no folder no/such"),
        (("--plot=run.jpg",), "must end with .png"),
        (("--dialogs=/dev/null",), "contains no dialogs"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_sent(
    flags: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    dialogs = tmp_path / "dialogs.jsonl"
    dialogs.write_text("[]\n")
    given = [flag.replace("DIALOGS", str(dialogs)) for flag in flags]

    done = CliRunner().invoke(main, ["bench", "--target", NOWHERE, *given])

    assert done.exit_code == 2
    assert complaint in " ".join(done.output.split())
