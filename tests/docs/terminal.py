"""Terminal: one bash in which the shell blocks of a page run one after the other."""

import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

START_SECONDS = 300.0  # on a busy machine
STOP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    status: int
    output: str
    errors: str


@dataclass(frozen=True, slots=True)
class Server:
    """A block that runs until it is interrupted."""

    pid: int  # also its process group's
    log: Path


class Terminal:
    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._files = folder / ".blocks"
        self._files.mkdir()
        self._numbers = itertools.count(1)
        self._servers: list[psutil.Process] = []
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # -e: a block has failed when one of its commands has. -m: a job hears of Ctrl-C.
        self._ask("set -em; echo ready")

    @property
    def alive(self) -> bool:
        """Whether no command has failed yet."""
        return self._bash.poll() is None

    def run(self, text: str) -> Result:
        """Runs a block to its end."""
        script = self._script(text)
        output, errors = script.with_suffix(".out"), script.with_suffix(".err")
        answer = self._ask(f". '{script}' < /dev/null > '{output}' 2> '{errors}'; echo $?")
        status = int(answer) if answer else self._bash.wait()
        return Result(status, output.read_text(errors="replace"), errors.read_text())

    def serve(self, text: str, port: int, ready: Callable[[int, Path], bool]) -> Server:
        """Starts a block that runs until Ctrl-C, and waits until it is ready at the port."""
        assert not listens(port)
        script = self._script(text)
        log = script.with_suffix(".log")
        pid = int(self._ask(f"( . '{script}' ) < /dev/null > '{log}' 2>&1 & echo $!"))
        self._servers.append(psutil.Process(pid))
        deadline = time.monotonic() + START_SECONDS
        while not ready(port, log):
            assert not _has_ended(self._servers[-1]), log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)
        return Server(pid, log)

    def interrupt(self, server: Server) -> int:
        """Ctrl-C; returns the exit status. Ends what the block left in the background, too."""
        started = _family(psutil.Process(server.pid))
        os.killpg(server.pid, signal.SIGINT)
        status = int(self._ask(f"wait {server.pid} && echo 0 || echo $?"))
        _end(started)
        return status

    def close(self) -> None:
        """Ends the session and all processes in it."""
        _end([process for each in self._servers for process in _family(each)])
        if self.alive:
            _end(_family(psutil.Process(self._bash.pid)))
        self._bash.communicate()

    def _ask(self, line: str) -> str:
        """One line of answer to a line; empty when bash has ended."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        print(line, file=self._bash.stdin, flush=True)
        return self._bash.stdout.readline().strip()

    def _script(self, text: str) -> Path:
        script = self._files / f"{next(self._numbers)}.sh"
        script.write_text(text)
        return script


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all processes that it has started, if they still exist."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, remaining = psutil.wait_procs(processes, STOP_SECONDS)
    for process in remaining:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def listens(port: int) -> bool:
    """Whether a process accepts connections on the port."""
    with closing(socket.socket()) as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def says_serving(port: int, log: Path) -> bool:
    """Whether the server that logs there says that it is healthy."""
    return "health changed" in log.read_text(errors="replace")


def is_serving(port: int, log: Path) -> bool:
    """Whether the health service on the port says SERVING."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            return bool(health.Check(HealthCheckRequest()).status == HealthCheckResponse.SERVING)
        except grpc.RpcError:
            return False
