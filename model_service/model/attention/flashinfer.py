"""FlashInfer's paged attention behind the backend interface: Ye et al., 2025, arXiv:2501.01005.

Spans of one token at the front of a batch (the scheduler puts them there) go to the decode kernel
and all others to the prefill kernel, because one tile size does not suit both. Each kernel is
planned once per step. Decode at a fixed batch size reads all that changes from buffers with fixed
addresses, so that a CUDA graph can hold its launch. This module needs the extra `cuda`: `select.py`
imports it only if FlashInfer is installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flashinfer
import numpy as np
import torch

from model_service.model.attention.backend import (
    AttentionBackend,
    BlockCopy,
    CacheShape,
    PagedCache,
    SequenceSpan,
)
from model_service.model.attention.flashinfer_kernels import decodes_on_tensor_cores
from model_service.model.attention.page_tables import PageTables, leading_decodes, page_tables
from model_service.model.attention.rotation import Cache, Heads, rotate_and_write
from model_service.model.cuda.pinned_transfer import Fence, pinned

_MIN_WORKSPACE = 128 * 2**20  # bytes, FlashInfer's recommendation
_INT_WORKSPACE = 2**20  # bytes; a decode plan of a thousand sequences needs less than 2**16


@dataclass(frozen=True, slots=True)
class _Heads:
    """The arguments of plans that are the same in every step."""

    query: int  # of this rank
    key: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def tensor_cores(self) -> bool:
        return decodes_on_tensor_cores(self.query, self.key)

    @property
    def for_plan(self) -> tuple[int, int, int, int]:
        return self.query, self.key, self.head_dim, self.block_size


class FlashInferAttention:
    """Prefill and decode of any mixture, planned step by step.

    Attributes:
        slots: int32 [tokens], where each token of the planned step lies in the cache.
    """

    def __init__(
        self,
        shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype,
        *,
        heads: int,
        max_batch_size: int,
    ) -> None:
        """Allocates cache and workspace.

        Args:
            shape: of this rank's cache.
            dtype: of queries and of the result of attention.
            device: a CUDA device.
            kv_dtype: of keys and values in the cache.
            heads: query heads of this rank.
            max_batch_size: most sequences that decode at once.
        """
        self._heads = _Heads(
            heads, shape.kv_heads, shape.head_dim, shape.block_size, dtype, kv_dtype
        )
        self._cache = PagedCache(shape, kv_dtype, device)
        # Plans copy from page-locked memory of FlashInfer's own, which the next plan overwrites.
        self._planned = Fence(device)
        size = workspace_bytes(heads, shape, max_batch_size, _multiprocessors(device))
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=self._heads.tensor_cores
        )
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        self._device = device
        self._decodes = 0  # rows of the step for the decode kernel
        self.slots = torch.zeros(0, dtype=torch.int32, device=device)

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        tables = page_tables(spans, self._heads.block_size)
        decodes = leading_decodes(spans)
        cut = tables.page_starts[decodes]
        arrays = (
            tables.slots,
            tables.page_starts[: decodes + 1],
            tables.pages[:cut],
            tables.last_page_lengths[:decodes],
            tables.query_starts[decodes:] - decodes,
            tables.page_starts[decodes:] - cut,
            tables.pages[cut:],
            tables.last_page_lengths[decodes:],
            tables.context_lengths,
        )
        parts = pinned(self._device, arrays)
        slots, decode, prefill, lengths = parts[0], parts[1:4], parts[4:8], parts[8]
        self.slots = slots.to(self._device, non_blocking=True)
        dtypes = {"q_data_type": self._heads.dtype, "kv_data_type": self._heads.kv_dtype}
        self._planned.wait()
        if decodes:
            self._decode.plan(*decode, *self._heads.for_plan, seq_lens=lengths[:decodes], **dtypes)
        if decodes < len(spans):
            self._prefill.plan(
                *prefill, *self._heads.for_plan, causal=True, seq_lens=lengths[decodes:], **dtypes
            )
        self._planned.record()
        self._decodes = decodes

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return self.rotate_and_attend(layer, Heads(query, key, value), None)

    def rotate_and_attend(
        self, layer: int, heads: Heads, rotation: torch.Tensor | None
    ) -> torch.Tensor:
        """See `rotation.RotateAndAttend`."""
        query = heads.query
        rotate_and_write(heads, rotation, self._cache.layer(layer), self.slots)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self.attend_written(layer, query, output)
        return output

    def attend_written(self, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        """See `graphs.SeparableAttention`."""
        cache, decodes, tokens = self._cache.layer(layer), self._decodes, len(self.slots)
        if decodes:
            self._decode.run(query[:decodes], cache, out=output[:decodes])
        if decodes < tokens:
            self._prefill.run(query[decodes:tokens], cache, out=output[decodes:tokens])

    def layer_cache(self, layer: int) -> Cache:
        return self._cache.layer(layer)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        self._cache.copy(copies)

    def fixed_batches(
        self, sizes: Sequence[int], context_length: int
    ) -> dict[int, AttentionBackend]:
        """A backend for decode steps of each of `sizes` sequences, on the same cache.

        All of them read the same buffers, so only one of them may be planned at a time.
        """
        pages = -(-context_length // self._heads.block_size)
        buffers = _FixedBuffers(max(sizes), pages, self._device)
        integers = torch.zeros(_INT_WORKSPACE, dtype=torch.uint8, device=self._device)
        batches: dict[int, AttentionBackend] = {}
        for size in sizes:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=self._heads.tensor_cores,
                paged_kv_indptr_buffer=buffers.page_starts[: size + 1],
                paged_kv_indices_buffer=buffers.pages,
                paged_kv_last_page_len_buffer=buffers.last_page_lengths[:size],
            )
            # One vector on the device serves all sizes, because only one plan is valid at a time.
            wrapper.reset_workspace_buffer(self._workspace, integers)
            batches[size] = _FixedDecode(self._heads, self._cache, self._planned, buffers, wrapper)
        return batches


class _FixedBuffers:
    """All that a decode step changes, in one vector on the device, so that one copy fills it."""

    def __init__(self, rows: int, pages_per_row: int, device: torch.device) -> None:
        # Aligns each part to 16 bytes.
        self._stride = -(-(rows + 1) // 4) * 4
        capacity = rows * pages_per_row
        self.vector = torch.zeros(3 * self._stride + capacity, dtype=torch.int32, device=device)
        self.page_starts, self.last_page_lengths, self.slots, self.pages = torch.split(
            self.vector, [self._stride] * 3 + [capacity]
        )

    def image(self, tables: PageTables) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The beginning of the vector when it holds `tables`."""
        image = np.zeros(3 * self._stride + len(tables.pages), dtype=np.int32)
        for index, part in enumerate(
            (tables.page_starts, tables.last_page_lengths, tables.slots, tables.pages)
        ):
            image[index * self._stride :][: len(part)] = part
        return image


class _FixedDecode:
    """Decode of a fixed number of sequences, from buffers with fixed addresses."""

    def __init__(
        self,
        heads: _Heads,
        cache: PagedCache,
        planned: Fence,
        buffers: _FixedBuffers,
        wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper,
    ) -> None:
        self._heads = heads
        self._cache = cache
        self._planned = planned
        self._buffers = buffers
        self._wrapper = wrapper
        self._knows_kernel = False

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        tables = page_tables(spans, self._heads.block_size)
        arrays = self._buffers.image(tables), tables.page_starts, tables.last_page_lengths
        image, starts, last = pinned(self._buffers.vector.device, arrays)
        self._buffers.vector[: len(image)].copy_(image, non_blocking=True)
        dtypes = {"q_data_type": self._heads.dtype, "kv_data_type": self._heads.kv_dtype}
        pages = self._buffers.pages[: len(tables.pages)]
        self._planned.wait()
        if self._knows_kernel:
            # Like `plan`, but with filled buffers and without a copy to the host.
            flashinfer.fast_decode_plan(
                self._wrapper,
                starts,
                pages,
                last,
                *self._heads.for_plan,
                global_override_indptr_cpu=starts,
                **dtypes,
            )
        else:
            # The first plan also finds the kernel that `fast_decode_plan` uses.
            self._wrapper.plan(starts, pages, last, *self._heads.for_plan, **dtypes)
            self._knows_kernel = True
        self._planned.record()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return self.rotate_and_attend(layer, Heads(query, key, value), None)

    def rotate_and_attend(
        self, layer: int, heads: Heads, rotation: torch.Tensor | None
    ) -> torch.Tensor:
        """See `rotation.RotateAndAttend`."""
        cache, slots = self._cache.layer(layer), self._buffers.slots[: len(heads.query)]
        rotate_and_write(heads, rotation, cache, slots)
        output: torch.Tensor = self._wrapper.run(heads.query, cache)
        return output


def workspace_bytes(
    heads: int, shape: CacheShape, max_batch_size: int, multiprocessors: int
) -> int:
    """Size of the partial results that kernels which share one sequence's keys leave to be merged.

    FlashInfer's scheduler (PrefillPlanImpl in attention/scheduler.cuh) needs float32 rows of
    head_dim, and their sums, for every tile of queries. In prefill two tiles of 128 rows run on
    each multiprocessor. In decode on tensor cores a tile of 16 holds one sequence or, at worst, a
    part of it.
    """
    shared = heads // shape.kv_heads
    at_once = 2 * multiprocessors // shape.kv_heads
    prefill = at_once * 128
    decode = max(at_once, -(-max_batch_size * shared // 16) + max_batch_size) * 16
    row = heads * (shape.head_dim + 1) * 4
    return max(_MIN_WORKSPACE, max(prefill, decode) * row + 4096)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
