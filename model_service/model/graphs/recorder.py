"""Records runs as CUDA graphs. Only this needs a CUDA device."""

import atexit
import weakref
from collections.abc import Callable, Iterable

import torch

Run = Callable[[], object]
# Turns a run into a function that repeats it.
Record = Callable[[Run], Run]


class GraphRecorder:
    """Records runs as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog queries events in its own thread, which must not end the capture.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()
        self._graphs.add(graph)
        return graph.replay


def _release(graphs: Iterable[torch.cuda.CUDAGraph]) -> None:
    for graph in graphs:
        graph.reset()
