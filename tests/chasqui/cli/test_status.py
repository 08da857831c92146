"""`chasqui status` as operators run it, against real gateways."""

import json
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.command import Run
from tests.e2e.processes import ServiceProcess

UNREACHABLE = "127.0.0.1:1"


@pytest.fixture
def lonely() -> Iterator[str]:
    """The address of a gateway without any service behind it."""
    targets = {
        "tokenizer_target": UNREACHABLE,
        "model_targets": UNREACHABLE,
        "safety_target": UNREACHABLE,
    }
    process = ServiceProcess("gateway", "-m", "gateway", **targets)
    yield process.address
    process.stop()


def test_status_shows_the_services_of_a_gateway_that_serves(run: Run, target: str) -> None:
    done = run("status", "--target", target)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"gateway    {target}  serving, up ")
    assert lines[1].strip() == "0 running, 0 queued, 0 detached, 0 displaced"
    assert lines[2].endswith("  serving")
    heads, replica = lines[4], lines[5]
    assert replica.split()[1:3] == ["serving", "gqa-mp1"]
    assert len(heads) == max(map(len, lines[4:6]))


def test_status_of_a_gateway_without_services_says_why_and_fails(run: Run, lonely: str) -> None:
    done = run("status", "--target", lonely)
    assert done.returncode == 1
    assert done.stdout.startswith(f"gateway    {lonely}  not serving, up ")
    assert (
        f"tokenizer  {UNREACHABLE}  connecting\nsafety     {UNREACHABLE}  connecting" in done.stdout
    )
    assert f"\n{UNREACHABLE}: " in done.stdout


def test_status_as_json_is_one_object(run: Run, target: str) -> None:
    found = json.loads(run("status", "--target", target, "--json").stdout)
    [replica] = found["replicas"]
    assert found["serving"]
    assert found["tokenizer"]["state"] == replica["upstream"]["state"] == "SERVING"
    assert replica["info"]["name"] == "gqa-mp1"
    assert replica["load"]["free_blocks"] == replica["load"]["total_blocks"] > 0
    assert 0 <= replica["load_age"] < found["uptime"]


def test_watch_goes_on_until_ctrl_c(spawn: Callable[..., Any], target: str) -> None:
    with spawn("status", "--target", target, "--watch", "--json") as process:
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert looks[0]["uptime"] < looks[1]["uptime"]


def test_nothing_at_the_target_is_one_line(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"
        done = run("status", "--target", target)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: nothing answers at {target} (Connection refused). ")
