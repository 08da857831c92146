"""The tensors of a memory-mapped GGUF file: checked, and dequantized piece by piece.

One thread dequantizes less than a good disk delivers. So as many threads as PyTorch may use share
the work, each on a piece that stays in the processor's cache.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from llama.gguf_header import TensorEntry
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.errors import FETCH_AGAIN, CheckpointError, shown_shape
from model_service.model.weights.files.gguf.dequantize import dequantize
from model_service.model.weights.files.gguf.header import CONVERT_AGAIN, tensor_bytes, type_name

# Types that are read as they lie in the file.
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_QUANTIZED = (
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ4_XS,
)
TYPES = (*_PLAIN, *_QUANTIZED)
_PIECE = 2**17  # weights that a thread dequantizes at once: 512 KiB in float32

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a mapped file.

    Attributes:
        shape: as in PyTorch, one or two sizes.
        type: one of `TYPES`.
        data: its bytes [rows, bytes per row], a view of the file.
    """

    shape: tuple[int, ...]
    type: Any
    data: NDArray[np.uint8]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers, or of dequantized ones."""
        return _PLAIN.get(self.type, torch.float32)

    def plain(self) -> torch.Tensor | None:
        """The numbers, a view of the file; None if they are quantized."""
        if self.type not in _PLAIN:
            return None
        return torch.from_numpy(self.data).view(self.dtype).view(self.shape)

    def copy_part(
        self,
        dimension: int,
        start: int,
        target: torch.Tensor,
        upload: WeightUpload,
        pool: "WorkerPool",
    ) -> None:
        """Fills `target` with the elements from `start` on along `dimension`."""
        if (numbers := self.plain()) is not None:
            part = numbers.narrow(dimension, start, target.shape[dimension])
            upload.copy(part, target)
            return
        height, width = target.shape
        row, column = (start, 0) if dimension == 0 else (0, start)
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        first, end = column // block, -(-(column + width) // block)
        # A slice of columns may begin inside a block, which is dequantized as a whole.
        inside = slice(column - first * block, column - first * block + width)
        data = self.data[row : row + height, first * block_bytes : end * block_bytes]
        rows = max(1, _PIECE // ((end - first) * block))

        def dequantized(begin: int) -> torch.Tensor:
            values = dequantize(data[begin : begin + rows], self.type)
            return values.view(-1, (end - first) * block)[:, inside]

        def fill(begin: int) -> None:
            target[begin : begin + rows].copy_(dequantized(begin))

        begins = range(0, height, rows)
        if upload.is_direct:
            deque(pool.ordered(fill, begins), maxlen=0)
            return
        for begin, values in zip(begins, pool.ordered(dequantized, begins), strict=True):
            upload.copy(values, target[begin : begin + rows])


class WorkerPool:
    """Threads that compute the pieces of a result, few of which wait in memory at a time.

    PyTorch does not divide their operations among threads of its own. Those would wait for the
    threads here, three times as long as the whole work takes.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()  # this rank's share of the machine
        self._executor = ThreadPoolExecutor(
            self._threads, initializer=torch.set_num_threads, initargs=(1,)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)
        # Each thread has a number of its own; a new thread begins with the one that was set last.
        torch.set_num_threads(self._threads)

    def ordered(
        self, function: Callable[[int], _Result], items: Iterable[int]
    ) -> Iterator[_Result]:
        """The results of `function` for all items, in their order."""
        waiting: deque[Future[_Result]] = deque()
        for item in items:
            waiting.append(self._executor.submit(function, item))
            if len(waiting) > self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def map_tensors(
    path: Path, entries: Mapping[str, TensorEntry], data: NDArray[np.uint8]
) -> dict[str, StoredTensor]:
    """The tensors of the file at `path`, whose bytes are `data`.

    Raises:
        CheckpointError: one is of a type that is not read, does not divide into blocks, or is not
            within the file.
    """
    _check_types(path, entries)
    tensors: dict[str, StoredTensor] = {}
    previous, free_from = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        kind = GGMLQuantizationType(entry.type_number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        *heights, width = entry.shape
        if width % block or len(heights) > 1:
            raise CheckpointError(
                path,
                f"{name} is {shown_shape(entry.shape)} in {kind.name}; a tensor has one or two "
                f"sizes, the last a multiple of the {block} weights in a block",
                CONVERT_AGAIN,
            )
        held = tensor_bytes(path, name, entry, data)
        if entry.begin < free_from:
            raise CheckpointError(
                path, f"is damaged: {previous} and {name} share bytes", FETCH_AGAIN
            )
        previous, free_from = name, entry.begin + len(held)
        rows = held.reshape((heights or [1])[0], width // block * block_bytes)
        tensors[name] = StoredTensor(entry.shape, kind, rows)
    return tensors


def _check_types(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    for name, entry in entries.items():
        if entry.type_number not in TYPES:
            supported = ", ".join(kind.name for kind in TYPES)
            raise CheckpointError(
                path,
                f"{name} is stored as {type_name(entry.type_number)}; these types are read: "
                f"{supported}",
                "download the model in one of these types, or convert it with llama-quantize",
            )
