"""The workers' processes: as many stay loaded as memory allows, and only one computes at a time.

Before a worker is asked anything the others must be at rest: OpenMP threads spin for a while after
their last loop, and would be measured along with the one that works.
"""

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import psutil

from bench.peers.environments import REPOSITORY, Environment

CALL_TIMEOUT = 1800.0  # seconds; no measurement is near it
REST_WINDOW = 0.05  # seconds without any CPU time: at rest
REST_TIMEOUT = 10.0
QUIT_TIMEOUT = 30.0


class WorkerError(Exception):
    """A worker failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Post:
    """A worker that can be started: its program, its model, and how much memory it takes."""

    name: str
    module: str
    environment: Environment
    job: Mapping[str, Any]  # arguments of bench.peers.protocol.Job
    bytes: int


@dataclass(slots=True)
class _Running:
    post: Post
    process: subprocess.Popen[bytes]
    info: dict[str, str]
    warm: set[str] = field(default_factory=set)


class Fleet:
    """Starts workers when they are first called; the one not called for longest makes room."""

    def __init__(self, memory: int, log_dir: Path, cores: int) -> None:
        self._memory = memory
        self._log_dir = log_dir
        self._cores = cores
        self._running: dict[str, _Running] = {}  # in order of their last call
        # CPU time that each worker used while another was asked.
        self.idle_seconds: dict[str, float] = {}

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        for name in tuple(self._running):
            self.stop(name)

    def info(self, post: Post) -> dict[str, str]:
        """Versions and settings, as the worker told them when it loaded."""
        return self._worker(post).info

    def call(self, post: Post, operation: str, **arguments: object) -> list[Any]:
        """What the worker answers, once all others are at rest.

        Raises:
            WorkerError: it failed, died, or gave no answer in time; it is not running any more.
        """
        worker = self._worker(post)
        others = {name: each.process for name, each in self._running.items() if each is not worker}
        rest(tuple(others.values()))
        before = {name: cpu_seconds([process]) for name, process in others.items()}
        answer = cast("list[Any]", self._ask(worker, operation, arguments))
        for name, process in others.items():
            used = cpu_seconds([process]) - before[name]
            self.idle_seconds[name] = self.idle_seconds.get(name, 0.0) + used
        return answer

    def warmed(self, post: Post, case: str) -> bool:
        """Whether the worker's present process was asked this case before; remembers that it is."""
        worker = self._worker(post)
        seen = case in worker.warm
        worker.warm.add(case)
        return seen

    def stop(self, name: str) -> None:
        """Ends a worker, if it runs."""
        worker = self._running.pop(name, None)
        if worker is None:
            return
        stdin = cast("IO[bytes]", worker.process.stdin)
        try:
            stdin.write(b'{"op": "quit"}\n')
            stdin.close()
        except BrokenPipeError:
            pass  # it is gone already
        try:
            worker.process.wait(QUIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()

    def _worker(self, post: Post) -> _Running:
        worker = self._running.pop(post.name, None)
        if worker is None:
            self._make_room(post.bytes)
            worker = _Running(post, self._start(post), {})
            self._running[post.name] = worker
            worker.info = cast("dict[str, str]", self._ask(worker, "load", post.job))
        self._running[post.name] = worker
        return worker

    def _make_room(self, wanted: int) -> None:
        while self._running and self._held() + wanted > self._memory:
            self.stop(next(iter(self._running)))

    def _held(self) -> int:
        return sum(worker.post.bytes for worker in self._running.values())

    def _start(self, post: Post) -> subprocess.Popen[bytes]:
        variables = {
            **os.environ,
            **post.environment.variables,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(self._cores),
            # Intel's OpenMP spins for 200 ms by default, and the others would have to wait.
            "KMP_BLOCKTIME": "1",
        }
        with (self._log_dir / f"{post.name}.log").open("wb") as log:
            return subprocess.Popen(
                [str(post.environment.python), "-m", post.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                cwd=REPOSITORY,
                bufsize=0,
            )

    def _ask(self, worker: _Running, operation: str, arguments: Mapping[str, object]) -> object:
        stdin = cast("IO[bytes]", worker.process.stdin)
        try:
            stdin.write(json.dumps({"op": operation, **arguments}).encode() + b"\n")
            answer = json.loads(self._line(worker))
        except (BrokenPipeError, ValueError) as error:
            self.stop(worker.post.name)
            raise WorkerError(f"{operation}: ended, {self._last_words(worker.post)}") from error
        except TimeoutError as error:
            worker.process.kill()
            self.stop(worker.post.name)
            raise WorkerError(f"{operation}: no answer in {CALL_TIMEOUT:.0f} s") from error
        if "error" in answer:
            self.stop(worker.post.name)
            raise WorkerError(f"{operation}: {answer['error']}")
        return answer["ok"]

    def _line(self, worker: _Running) -> bytes:
        """The answer; an empty or partial one when the worker died."""
        stdout = cast("IO[bytes]", worker.process.stdout)
        line, deadline = b"", time.monotonic() + CALL_TIMEOUT
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], deadline - time.monotonic())
            if not ready:
                raise TimeoutError
            part = os.read(stdout.fileno(), 2**16)
            if not part:
                break
            line += part
        return line

    def _last_words(self, post: Post) -> str:
        lines = (self._log_dir / f"{post.name}.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "no output"


def cpu_seconds(processes: Sequence[subprocess.Popen[bytes]]) -> float:
    """CPU time that live processes have used so far, their children included."""
    total = 0.0
    for process in processes:
        try:
            family = psutil.Process(process.pid)
            for each in (family, *family.children(recursive=True)):
                times = each.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


def rest(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits until the processes use no CPU time; gives up after REST_TIMEOUT."""
    deadline = time.monotonic() + REST_TIMEOUT
    before = cpu_seconds(processes)
    while processes and time.monotonic() < deadline:
        time.sleep(REST_WINDOW)
        now = cpu_seconds(processes)
        if now == before:
            return
        before = now
