"""FlashInfer's documented interface in plain PyTorch, for machines that cannot run its kernels.

Only what the backend uses, written from the docstrings of flashinfer-python 0.6.18: what index
vectors mean, which buffers are read when, and that a wrapper in CUDA graph mode reads its own
buffers alone. Attention itself is written out, sequence by sequence.
"""

import math
from typing import Any

import torch


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD"
        self.plan_arguments: dict[str, Any] = {}

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        *heads: int,
        causal: bool,
        seq_lens: torch.Tensor,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        self._starts = qo_indptr.clone()
        self._tables = (paged_kv_indptr.clone(), paged_kv_indices.clone(), seq_lens.clone())
        expected = (paged_kv_indptr.diff() - 1) * heads[3] + paged_kv_last_page_len
        assert torch.equal(seq_lens, expected)

    def run(
        self, query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
    ) -> torch.Tensor:
        assert len(query) == self._starts[-1]
        return out.copy_(_attention(query, cache, self._starts, *self._tables))


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self,
        workspace: torch.Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        self.in_graph = use_cuda_graph
        self.planned = False
        self._buffers: Any = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )

    def reset_workspace_buffer(self, workspace: torch.Tensor, integers: torch.Tensor) -> None:
        assert integers.dtype == torch.uint8

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        seq_lens: torch.Tensor | None = None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        self.planned = True
        if not self.in_graph:
            self._buffers = (indptr.clone(), indices.clone(), last_page_len.clone())
            return
        assert len(last_page_len) == len(self._buffers[2])
        for buffer, values in zip(self._buffers, (indptr, indices, last_page_len), strict=True):
            buffer[: len(values)].copy_(values.clone())

    def run(
        self,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        starts, pages, last = self._buffers
        assert self.planned
        assert len(query) == len(last)
        lengths = (starts.diff() - 1) * cache[0].shape[1] + last
        ones = torch.arange(len(query) + 1)
        result = _attention(query, cache, ones, starts, pages, lengths)
        return result if out is None else out.copy_(result)


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    *heads: int,
    q_data_type: torch.dtype,
    kv_data_type: torch.dtype,
    global_override_indptr_cpu: torch.Tensor,
) -> None:
    """In CUDA graph mode it fills no buffer, because its caller has."""
    assert wrapper.in_graph
    assert wrapper.planned
    assert indptr.device.type == last_page_len.device.type == "cpu"


def _attention(
    query: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    query_starts: torch.Tensor,
    page_starts: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Causal, the last query at the last position of its context."""
    parts = []
    for i, length in enumerate(lengths.tolist()):
        own = query[query_starts[i] : query_starts[i + 1]]
        table = pages[page_starts[i] : page_starts[i + 1]].long()
        key, value = (each[table].flatten(0, 1)[:length].to(query.dtype) for each in cache)
        shared = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", own, key) / math.sqrt(query.shape[-1])
        seen = torch.ones(len(own), length).tril(length - len(own)).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(parts)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    residual += x
    x.copy_(rmsnorm(residual, weight, eps))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]) * x[..., half:]
