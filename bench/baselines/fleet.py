"""The workers' processes: as many stay loaded as memory allows, and only one computes at a time.

A worker that is not asked anything is stopped (SIGSTOP, its children too): OpenMP threads spin for
a while after their last loop, some engines poll, and both would be measured along with another.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from bench.baselines.environments import REPOSITORY, Environment

CALL_TIMEOUT = 1800.0  # seconds; no measurement is near it
QUIT_TIMEOUT = 30.0


class WorkerError(Exception):
    """A worker failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Post:
    """A worker that can be started: its program, its model, and how much memory it takes."""

    name: str
    module: str
    environment: Environment
    job: Mapping[str, Any]  # arguments of bench.baselines.protocol.Job
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

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        for name in tuple(self._running):
            self.stop(name)

    def info(self, post: Post) -> dict[str, str]:
        """Versions and settings, as the worker told them when it loaded."""
        return self._worker(post).info

    def call(self, post: Post, operation: str, **arguments: object) -> list[Any]:
        """What the worker answers; all others are stopped meanwhile.

        Raises:
            WorkerError: it failed, died, or gave no answer in time; it is not running any more.
        """
        return cast("list[Any]", self._ask(self._worker(post), operation, arguments))

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
        _signal(worker, signal.SIGCONT)
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
                # A group, to be stopped as one. Should this process die, the kernel hangs up on
                # it, as on every stopped group whose last tie to its session is cut.
                process_group=0,
            )

    def _ask(self, worker: _Running, operation: str, arguments: Mapping[str, object]) -> object:
        stdin = cast("IO[bytes]", worker.process.stdin)
        _signal(worker, signal.SIGCONT)
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
        _signal(worker, signal.SIGSTOP)
        # Until it has stopped, or died. WNOWAIT: reaping is subprocess's own.
        os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
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


def _signal(worker: _Running, number: signal.Signals) -> None:
    """Signals the worker and its children, unless they are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, number)
