"""The workers' processes: as many stay loaded as memory allows, and only one computes at a time.

A worker that waits is stopped by SIGSTOP, its children too, so that no thread spins or polls.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from bench.baselines.environments import REPOSITORY, Environment

QUIT_TIMEOUT = 30.0  # seconds


class WorkerError(Exception):
    """A worker failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker that can be started: its program, its model, and how much memory it needs."""

    name: str
    module: str
    environment: Environment
    job: Mapping[str, Any]  # arguments of bench.baselines.protocol.Job
    bytes: int


@dataclass(slots=True)
class _Running:
    spec: WorkerSpec
    process: subprocess.Popen[bytes]
    info: dict[str, str] = field(default_factory=dict)
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

    def info(self, spec: WorkerSpec) -> dict[str, str]:
        """Versions and settings, as the worker told them when it loaded."""
        return self._worker(spec).info

    def call(self, spec: WorkerSpec, operation: str, **arguments: object) -> list[Any]:
        """The worker's answer; all others are stopped meanwhile.

        Raises:
            WorkerError: it failed or died; it is not running any more.
        """
        return cast("list[Any]", self._ask(self._worker(spec), operation, arguments))

    def warmed(self, spec: WorkerSpec, case: str) -> bool:
        """Whether the worker's present process was asked this case before; remembers that it is."""
        worker = self._worker(spec)
        seen = case in worker.warm
        worker.warm.add(case)
        return seen

    def stop(self, name: str) -> None:
        """Ends a worker, if it runs."""
        worker = self._running.pop(name, None)
        if worker is None:
            return
        _signal(worker, signal.SIGCONT)
        stdin = cast("IO[bytes]", worker.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            stdin.close()
        try:
            worker.process.wait(QUIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()

    def _worker(self, spec: WorkerSpec) -> _Running:
        worker = self._running.pop(spec.name, None)
        if worker is None:
            while self._running and self._held() + spec.bytes > self._memory:
                self.stop(next(iter(self._running)))
            worker = _Running(spec, self._start(spec))
            self._running[spec.name] = worker
            worker.info = cast("dict[str, str]", self._ask(worker, "load", spec.job))
        self._running[spec.name] = worker
        return worker

    def _held(self) -> int:
        return sum(worker.spec.bytes for worker in self._running.values())

    def _start(self, spec: WorkerSpec) -> subprocess.Popen[bytes]:
        variables = {
            **os.environ,
            **spec.environment.variables,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(self._cores),
        }
        with (self._log_dir / f"{spec.name}.log").open("wb") as log:
            return subprocess.Popen(
                [str(spec.environment.python), "-m", spec.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                cwd=REPOSITORY,
                # A group, to be stopped as one. Should this process die, the kernel hangs up on
                # it, as on every stopped group whose last tie to its session is cut.
                process_group=0,
            )

    def _ask(self, worker: _Running, operation: str, arguments: Mapping[str, object]) -> object:
        stdin, stdout = (
            cast("IO[bytes]", f) for f in (worker.process.stdin, worker.process.stdout)
        )
        _signal(worker, signal.SIGCONT)
        try:
            stdin.write(json.dumps({"op": operation, **arguments}).encode() + b"\n")
            stdin.flush()
            answer = json.loads(stdout.readline())
        except (BrokenPipeError, ValueError) as error:  # an empty or partial line: it died
            self.stop(worker.spec.name)
            log = (self._log_dir / f"{worker.spec.name}.log").read_text(errors="replace")
            last_line = (log.splitlines() or ["no output"])[-1]
            raise WorkerError(f"{operation}: ended, {last_line}") from error
        if "error" in answer:
            self.stop(worker.spec.name)
            raise WorkerError(f"{operation}: {answer['error']}")
        _signal(worker, signal.SIGSTOP)
        # Until it has stopped, or died. WNOWAIT: reaping is subprocess's own.
        os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return answer["ok"]


def _signal(worker: _Running, number: signal.Signals) -> None:
    """Signals the worker and its children, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, number)
