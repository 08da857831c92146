"""Ranks of one machine: where they listen, and how they end."""

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import psutil
import pytest

LAUNCHER = ("-m", "model_service.launcher", "--shards=2")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")
SOCKETS = Path(__file__).with_name("rank_sockets.py")
# Programs of the ranks. A line is one write, so that those of two ranks stay apart.
TELL = "import os, signal, sys\nos.write(1, f'{os.getpid()}\\n'.encode())\n"
WAIT = f"{TELL}signal.pause()\n"
# Signals are blocked, not handled: one that comes before a rank waits for it is not lost.
FINISH = f"""
import signal
both = {{signal.SIGTERM, signal.SIGINT}}
signal.pthread_sigmask(signal.SIG_BLOCK, both)
{TELL}
got = [signal.sigwait(both).value] if os.environ["RANK"] == "0" else []
os.write(1, f"got {{got + [each.value for each in signal.sigpending()]}}\\n".encode())
"""

FOLDER = """
import os
folder = os.path.dirname(os.environ["RANK_STORE_FILE"])
os.write(1, f"{folder} {os.stat(folder).st_mode:o}\\n".encode())
"""

Start = Callable[[str], "subprocess.Popen[str]"]
Sockets = Callable[..., tuple[set[str], set[str]]]


def beyond_loopback(addresses: set[str]) -> set[str]:
    parsed = {each: ipaddress.ip_address(each) for each in addresses}
    mapped = {each: getattr(ip, "ipv4_mapped", None) or ip for each, ip in parsed.items()}
    return {each for each, ip in mapped.items() if not ip.is_loopback}


@pytest.fixture
def outward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has gloo listen beyond loopback, if the machine has such an interface and nothing forbids."""
    for name, addresses in psutil.net_if_addrs().items():
        ipv4 = {each.address for each in addresses if each.family == socket.AF_INET}
        if beyond_loopback(ipv4):
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)


@pytest.fixture
def sockets(tmp_path: Path) -> Sockets:
    """Where two ranks listen when they have met, and where the process listens that starts them."""

    def run(*launcher: str, **variables: str) -> tuple[set[str], set[str]]:
        command = [sys.executable, *launcher, str(SOCKETS), str(tmp_path / "addresses")]
        subprocess.run(command, check=True, env=os.environ | variables, timeout=120)
        read = [json.loads(file.read_text()) for file in tmp_path.glob("addresses-?.json")]
        assert len(read) == 2
        return {ip for each in read for ip in each["ranks"]}, set(read[0]["starter"])

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Launches a program as two ranks."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str) -> "subprocess.Popen[str]":
        script = tmp_path / "script.py"
        script.write_text(program)
        command = [sys.executable, *LAUNCHER, str(script)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def pids(process: "subprocess.Popen[str]") -> list[int]:
    """The ranks, once both have said that they run."""
    return [int(next(cast("IO[str]", process.stdout))) for _ in range(2)]


@pytest.mark.usefixtures("outward")
def test_ranks_and_launcher_listen_on_loopback_alone(sockets: Sockets) -> None:
    ranks, launcher = sockets(*LAUNCHER)
    assert ranks
    assert not beyond_loopback(ranks | launcher)


@pytest.mark.usefixtures("outward")
def test_of_torchrun_only_its_own_process_listens_beyond_loopback(sockets: Sockets) -> None:
    ranks, torchrun = sockets(*TORCHRUN, "--standalone")
    assert not beyond_loopback(ranks)
    assert beyond_loopback(torchrun)  # as docs/security.md says


@pytest.mark.usefixtures("outward")
def test_a_store_that_torchrun_leaves_to_the_ranks_is_on_loopback(
    sockets: Sockets, tmp_path: Path
) -> None:
    file = ("--rdzv_backend=c10d", "--rdzv_conf=store_type=file", "--rdzv_id=ranks")
    endpoint = f"--rdzv_endpoint={tmp_path / 'store'}"
    ranks, torchrun = sockets(*TORCHRUN, *file, endpoint, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert not beyond_loopback(ranks | torchrun)


def test_ranks_meet_in_a_folder_that_is_private_and_goes_with_them(start: Start) -> None:
    process = start(FOLDER)
    lines, _ = process.communicate()
    [line] = set(lines.splitlines())  # both say the same
    path, mode = line.split()
    assert mode == "40700"
    assert not Path(path).exists()
    assert process.returncode == 0


def test_the_status_of_the_rank_that_failed_is_passed_on(start: Start) -> None:
    process = start("import os, sys\nif os.environ['RANK'] == '1': sys.exit(3)")
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (3, "")


def test_a_rank_that_is_killed_is_named(start: Start) -> None:
    process = start(f"{TELL}if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)")
    ranks = pids(process)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr in {f"rank 1 (pid {pid}) was killed by SIGKILL\n" for pid in ranks}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_leader_once_and_the_ranks_finish(
    start: Start, signum: signal.Signals
) -> None:
    process = start(FINISH)
    lines = cast("IO[str]", process.stdout)
    told = [next(lines) for _ in range(3)]  # two pids, and what the other rank got
    process.send_signal(signum)
    assert "got []\n" in told
    assert lines.read() == f"got [{signum}]\n"
    assert process.wait() == 0


def test_a_second_signal_ends_all_ranks_at_once(start: Start) -> None:
    process = start(f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAIT}")
    ranks = pids(process)
    process.send_signal(signal.SIGINT)
    process.terminate()
    process.communicate()
    # Two signals that are pending at once may arrive in either order.
    assert -process.returncode in {signal.SIGINT, signal.SIGTERM}
    assert not any(map(psutil.pid_exists, ranks))


def test_a_launcher_that_is_killed_leaves_nothing_behind(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start(WAIT)
    ranks = [psutil.Process(pid) for pid in pids(process)]
    ranks[1].suspend()
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    while [*tmp_path.glob("chasqui-ranks-*")]:  # the guard may end last
        pass
