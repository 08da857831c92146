"""Records runs as CUDA graphs. Only this needs a CUDA device."""

import atexit
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch

Run = Callable[[], object]


class Recorder(Protocol):
    def __call__(self, run: Run) -> Run:
        """A function that repeats what `run` gives the device, with the same tensors.

        Calls `run` once to compile and load kernels, and once to record it.
        """

    def between(self, call: Run) -> None:
        """Within a run: is not recorded, and called anew at this place in every repetition."""


class GraphRecorder:
    """Records runs as CUDA graphs that share one pool of memory.

    So a run's memory may be another's as soon as its own flow has freed it, and runs must be
    repeated one after the other.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._capture = ExitStack()
        self._parts: list[Run] | None = None  # of the run that is being captured
        # The function that replays a graph keeps it alive. NCCL takes a communicator down only if
        # no graph holds its kernels. Exit handlers run in reverse order, so this one releases the
        # graphs before the process group ends.
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        atexit.register(_release, self._graphs)

    def __call__(self, run: Run) -> Run:
        # One run outside of the graph compiles and loads kernels and makes libraries' handles.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        parts = self._parts = []
        try:
            with self._capture:
                self._begin(parts)
                run()
        finally:
            self._parts = None
        return parts[0] if len(parts) == 1 else partial(_in_turn, parts)

    def between(self, call: Run) -> None:
        """See `Recorder`: ends a graph and begins another."""
        if self._parts is None:
            call()
            return
        self._capture.close()
        self._parts.append(call)
        self._begin(self._parts)

    def _begin(self, parts: list[Run]) -> None:
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog queries events in its own thread, which must not end the capture.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        self._capture.enter_context(capture)
        self._graphs.add(graph)
        parts.append(graph.replay)


def _in_turn(parts: Sequence[Run]) -> None:
    for part in parts:
        part()


def _release(graphs: Iterable[torch.cuda.CUDAGraph]) -> None:
    for graph in graphs:
        graph.reset()
