"""Recorders of runs for the CPU, which has no CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_service.model.graphs.recorder import Run

# A CUDA graph cannot hold these: the host would wait for the device.
READ_BY_THE_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}
FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}


class Rerun:
    """Its records are the runs themselves."""

    def __call__(self, run: Run) -> Run:
        run()
        return run

    def between(self, call: Run) -> None:
        call()


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types
    """The operations of a run with their tensors, like a graph's kernels with their addresses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in READ_BY_THE_HOST, name
        made = func(*args, **(kwargs or {}))
        computes = func._schema.is_mutable or not _is_alias(made, args)
        if computes and not (self._inside or name in FREE):
            self._operations.append((func, args, kwargs or {}, made))
        return made

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a function, and records it as one operation."""
        with self._one():
            made = function(*args, **kwargs)
        self._operations.append((function, args, kwargs, made))
        return made

    @contextmanager
    def _one(self) -> Iterator[None]:
        self._inside += 1
        yield
        self._inside -= 1

    def replay(self) -> None:
        """Computes the operations again, from what their tensors hold now, into the same memory."""
        with torch.inference_mode():
            for function, args, kwargs, made in self._operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _is_alias(made: Any, args: Any) -> bool:
    """Whether a result is an argument's memory; a conversion may be that or new memory."""
    memory = [each.untyped_storage().data_ptr() for each in tree_leaves(args) if _is_tensor(each)]
    return _is_tensor(made) and made.untyped_storage().data_ptr() in memory


def _is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


class TapeRecorder:
    """Records operations, and repeats these without the Python code that called them."""

    def __init__(self) -> None:
        self._parts: list[Run] | None = None
        self._capture = ExitStack()
        self.tape: Tape | None = None  # that is being recorded

    def __call__(self, run: Run) -> Run:
        run()
        parts = self._parts = []
        with self._capture:
            self._begin(parts)
            run()
        self._parts = self.tape = None
        return lambda: [part() for part in parts]

    def between(self, call: Run) -> None:
        if self._parts is None:
            call()
            return
        self._capture.close()
        self._parts.append(call)
        self._begin(self._parts)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a function of which PyTorch does not know, and records it as one operation."""
        return self.tape.call(function, *args, **kwargs) if self.tape else function(*args, **kwargs)

    def _begin(self, parts: list[Run]) -> None:
        self.tape = Tape()
        self._capture.enter_context(self.tape)
        parts.append(self.tape.replay)
