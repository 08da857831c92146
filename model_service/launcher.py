"""Starts the ranks of one replica on this machine, and ends them together.

The ranks meet in a file of a private folder. torchrun's rendezvous listens on all network
interfaces instead, asks for no password, and unpickles what it is sent.

The ranks share a process group with a guard, a shell that waits for the end of its standard input
and then removes the folder and kills the group. So a launcher that is killed leaves nothing behind,
and Ctrl-C in a terminal reaches the ranks only through the launcher.

This module imports no PyTorch. `python -m model_service.launcher` starts any program this way.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.errors import StartError

# Names the file where the ranks meet, to each of them.
STORE_VARIABLE = "RANK_STORE_FILE"
# Its argument is the private folder. When the launcher ends while a rank is stopped, the kernel
# sends SIGHUP to the group.
GUARD = 'trap "" HUP; read _; rm -rf -- "$1"; kill -KILL 0'
# Seconds that the other ranks get to log why they end when one has failed.
EXIT_LOG_TIMEOUT = 5.0


class RankKilledError(StartError):
    """A signal ended a rank, so the rank itself could not log why."""


def launch(command: Sequence[str], ranks: int) -> int:
    """Runs `command` as `ranks` processes, until all of them have ended.

    The first SIGTERM or SIGINT is sent on to rank 0, which releases the others when it has
    finished. A second one kills all ranks. If a signal ends the ranks, it ends this process, too.

    Returns:
        0, or the exit status of the rank that failed first; it ends the others.

    Raises:
        RankKilledError: a signal from elsewhere ended the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="chasqui-ranks-") as folder:  # mode 0700
        failure = asyncio.run(_Launch(command, ranks, Path(folder)).run())
    match failure:
        case None:
            return 0
        case signal.Signals():
            signal.signal(failure, signal.SIG_DFL)
            signal.raise_signal(failure)
            raise AssertionError(f"{failure.name} did not end the process")
        case _Ended(status=status) if status > 0:
            return status
        case _Ended():
            raise RankKilledError(str(failure))


def is_rank() -> bool:
    """Whether this process was started as a rank, by `launch` or by torchrun."""
    return "WORLD_SIZE" in os.environ


@dataclass(frozen=True, slots=True)
class _Ended:
    """The end of a rank; `status` is that of `Process.returncode`."""

    rank: int
    pid: int
    status: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (pid {self.pid}) was killed by {signal.Signals(-self.status).name}"
        )


class _Launch:
    """The processes of one `launch`."""

    def __init__(self, command: Sequence[str], ranks: int, folder: Path) -> None:
        self._command = command
        self._folder = folder
        self._variables = [_variables(rank, ranks, folder / "store") for rank in range(ranks)]
        self._processes: list[Process] = []
        self._group = 0
        self._stopped_by: signal.Signals | None = None

    async def run(self) -> _Ended | signal.Signals | None:
        """The rank that failed first, the signal that stopped the ranks, or None."""
        guard = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", GUARD, "guard", self._folder),
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=DEVNULL,
            process_group=0,
        )
        self._group = guard.pid
        try:
            for variables in self._variables:
                rank = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=DEVNULL,
                    env=os.environ | variables,
                    process_group=self._group,
                )
                self._processes.append(rank)
            for signum in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(signum, self._stop, signum)
            failed = await self._first_failure()
        finally:
            self._kill()
            await asyncio.gather(guard.wait(), *(each.wait() for each in self._processes))
        if failed is not None and self._stopped_by is not None and failed.status < 0:
            return self._stopped_by
        return failed

    async def _first_failure(self) -> _Ended | None:
        """Waits for all ranks; once one has failed, for EXIT_LOG_TIMEOUT at most."""
        running = {asyncio.create_task(self._end(rank)) for rank in range(len(self._processes))}
        failed: _Ended | None = None
        while running and failed is None:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            failed = next((end for task in done if (end := task.result()).status), None)
        # Once stopped, the ranks have nothing to add.
        if running and self._stopped_by is None:
            await asyncio.wait(running, timeout=EXIT_LOG_TIMEOUT)
        return failed

    async def _end(self, rank: int) -> _Ended:
        process = self._processes[rank]
        return _Ended(rank, process.pid, await process.wait())

    def _stop(self, signum: signal.Signals) -> None:
        if self._stopped_by is not None:
            self._kill()
        self._stopped_by = signum
        leader = self._processes[0]
        # asyncio's send_signal would wait for a process that has just ended, and lose its status.
        if leader.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader.pid, signum)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)


def _variables(rank: int, ranks: int, store: Path) -> dict[str, str]:
    """The variables that tell a process its rank, under torchrun's names."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        STORE_VARIABLE: str(store),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model_service.launcher",
        description="Runs a Python program as the ranks of one replica on this machine.",
    )
    parser.add_argument("--shards", type=_positive, required=True, help="how many ranks")
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module's name")
    parser.add_argument("program", metavar="PROGRAM")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    module = ["-m"] if given.module else []
    try:
        status = launch([sys.executable, *module, given.program, *given.arguments], given.shards)
    except RankKilledError as error:
        sys.exit(str(error))
    sys.exit(status)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    main()
