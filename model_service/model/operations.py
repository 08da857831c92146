"""The operations between matrix products and attention: norms, rotary embedding, SwiGLU's gate.

`PlainOperations` is Meta's arithmetic in PyTorch and runs everywhere. `FusedOperations` computes
each in one FlashInfer kernel, in float32 inside, and overwrites its inputs; `RowOperations` does so
on the CPU, where a row has the same bits in any batch, and `InvariantOperations` has them on CUDA.
The network does not know which it has.
"""

import math
from typing import Protocol

import torch
from torch.nn import functional as F

from model_service.model.attention.flashinfer_kernels import import_flashinfer
from model_service.model.attention.select import can_use_flashinfer
from model_service.model.config import ROPE_THETA, ModelConfig, RopeScaling
from model_service.model.cpu.kernels import Kernels, kernels_for


class Operations(Protocol):
    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square normalization (Zhang and Sennrich, 2019) of x [tokens, dim]."""

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, both [tokens, dim], and that sum; may overwrite both."""

    def rotation(self, positions: torch.Tensor) -> torch.Tensor:
        """The angles that `rotate` needs at these positions [tokens]; called once per step."""

    def rotate(self, heads: torch.Tensor, queries: int, rotation: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of heads [tokens, heads, head_dim], neighbouring features in pairs.

        The first `queries` heads are queries, the others keys. May overwrite `heads`.
        """

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """silu(first half) x second half of x [tokens, 2 x hidden]: SwiGLU (Shazeer, 2020)."""


def make_operations(
    config: ModelConfig,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_invariant: bool = False,
) -> Operations:
    """The fastest operations in `dtype` on `device`, for positions below `context_length`.

    With `batch_invariant`, those that go with the kernels of `model/cuda/`.
    """
    if dtype == torch.float32:
        # float32 stands for the results of Meta's code. So no product may round its factors to
        # TF32, which keeps 10 bits of 23, even if other code in this process has allowed it.
        torch.set_float32_matmul_precision("highest")
    rotary = rotary_frequencies(
        config.head_dim, context_length, config.rope_theta, config.rope_scaling
    )
    if batch_invariant:
        return InvariantOperations(rotary.to(device))
    if can_use_flashinfer(dtype, device, config.head_dim):
        return FusedOperations(rotary.to(device))
    if kernels := kernels_for(dtype, device):
        return RowOperations(kernels, rotary)
    return PlainOperations(rotary.to(device))


def rotary_frequencies(
    head_dim: int, length: int, theta: float = ROPE_THETA, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Unit complex numbers [length, head_dim / 2] that rotate a pair of features at each position.

    RoPE (Su et al., 2021), as `precompute_freqs_cis` in Meta's llama/model.py.
    """
    inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if scaling is not None:
        inverse = _scaled(inverse, scaling)
    angles = torch.outer(torch.arange(length).float(), inverse)
    return torch.polar(torch.ones_like(angles), angles)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies [head_dim / 2], in radians per token, for a longer context.

    llama3 is `apply_scaling` in the llama/model.py of Meta's Llama 3, `_compute_llama3_parameters`
    in transformers.
    """
    divided = frequencies / scaling.factor
    if scaling.kind == "linear":
        return divided
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0 for low frequencies, 1 for high ones
    return (1 - kept) * divided + kept * frequencies


def apply_rotary(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotates x [tokens, heads, head_dim] by rotary [tokens, head_dim / 2], neighbours in pairs."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotary.unsqueeze(1)).flatten(-2).type_as(x)


class PlainOperations:
    """PyTorch's, on any device; in float32 exactly Meta's arithmetic."""

    def __init__(self, rotary: torch.Tensor) -> None:
        self._rotary = rotary

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return self.norm(total, weight, eps), total

    def rotation(self, positions: torch.Tensor) -> torch.Tensor:
        return self._rotary[positions]

    def rotate(self, heads: torch.Tensor, queries: int, rotation: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # FusedOperations needs it
        return apply_rotary(heads, rotation)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class FusedOperations:
    """FlashInfer's kernels, for float16 and bfloat16 on CUDA."""

    def __init__(self, rotary: torch.Tensor) -> None:
        self._kernels = import_flashinfer()
        self._rotary = rotary

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed: torch.Tensor = self._kernels.rmsnorm(x, weight, eps)
        return normed

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._kernels.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    def rotation(self, positions: torch.Tensor) -> torch.Tensor:
        return self._rotary[positions]

    def rotate(self, heads: torch.Tensor, queries: int, rotation: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # PlainOperations' interface
        # FlashInfer's backend of attention rotates by itself, in the kernel that writes the cache.
        return apply_rotary(heads, rotation)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self._kernels.silu_and_mul(x)
        return gated


class InvariantOperations(PlainOperations):
    """On CUDA, a row's bits depend on that row alone.

    The layers' kernels (`cuda/layers.py`) compute all of it but the last norm.
    """

    def __init__(self, rotary: torch.Tensor) -> None:
        from model_service.model.cuda.norm_kernel import norm  # noqa: PLC0415  # needs Triton

        super().__init__(rotary)
        self._norm = norm

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, weight, eps)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)


class RowOperations:
    """The kernels that are compiled with this package, for float32 and bfloat16 on the CPU.

    Attributes:
        rotary: the angles of all positions, as `rotary_frequencies` gives them.
    """

    def __init__(self, kernels: Kernels, rotary: torch.Tensor) -> None:
        self._kernels = kernels
        self.rotary = rotary

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._kernels.norm(x, None, weight, eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.norm(x, residual, weight, eps), residual

    def rotation(self, positions: torch.Tensor) -> torch.Tensor:
        return self.rotary.index_select(0, positions)

    def rotate(self, heads: torch.Tensor, queries: int, rotation: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # FusedOperations needs it
        self._kernels.rotate(heads, rotation)
        return heads

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.gate(x)
