"""Rotary embedding on the way to attention: apart from it, or with the write to the cache.

Between the product that makes queries, keys and values and attention over the cache lie rotation,
conversion to the cache's type and the write. For a few tokens each is a kernel that starts and ends
without doing much, so a backend on CUDA does all of them in one.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from model_service.model.attention.backend import AttentionBackend, narrowed

Cache = tuple[torch.Tensor, torch.Tensor]  # keys, values [blocks, block_size, kv_heads, head_dim]


class Rotary(NamedTuple):
    """The rotation of a step, the same in all layers."""

    rotate: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]  # `Operations.rotate`
    rotation: torch.Tensor  # from `Operations.rotation`, for the step's positions


class Heads(NamedTuple):  # one per layer and step: a frozen dataclass is slower to create
    """A step's heads; the last two dimensions of each are contiguous."""

    query: torch.Tensor  # [num_tokens, heads, head_dim]
    key: torch.Tensor  # [num_tokens, kv_heads, head_dim]
    value: torch.Tensor  # [num_tokens, kv_heads, head_dim]


class RotateAndAttend(Protocol):
    """A backend's method `rotate_and_attend`."""

    def __call__(self, layer: int, heads: Heads, rotation: torch.Tensor) -> torch.Tensor:
        """`AttentionBackend.attend` with queries and keys that are still to be rotated.

        Args:
            layer: as for `attend`.
            heads: as for `attend`; the queries may be overwritten.
            rotation: complex64 [num_tokens, head_dim / 2], from `Operations.rotation`.
        """


def attend_rotated(
    backend: AttentionBackend,
    layer: int,
    heads: torch.Tensor,
    queries: int,
    rotary: Rotary,
) -> torch.Tensor:
    """Attention of one layer, rotated by the backend if it can, else by `rotary`.

    Args:
        backend: holds the cache and the plan of the step.
        layer: selects the part of the cache.
        heads: queries, keys and values [num_tokens, heads, head_dim]; may be overwritten.
        queries: heads that are queries; of the others, one half are keys.
        rotary: of the step.

    Returns:
        [num_tokens, queries, head_dim].
    """
    kv_heads = (heads.shape[1] - queries) // 2
    value = heads[:, -kv_heads:]
    fused: RotateAndAttend | None = getattr(backend, "rotate_and_attend", None)
    if fused is not None:
        return fused(
            layer, Heads(heads[:, :queries], heads[:, queries:-kv_heads], value), rotary.rotation
        )
    rotated = rotary.rotate(heads[:, :-kv_heads], queries, rotary.rotation)
    return backend.attend(layer, rotated[:, :queries], rotated[:, queries:], value)


def rotate_and_write(
    heads: Heads,
    rotation: torch.Tensor | None,
    cache: Cache,
    slots: torch.Tensor,
    rotated: torch.Tensor | None = None,
) -> None:
    """Rotates queries, and writes rotated keys and values to the cache of a layer.

    On CUDA this is one kernel (`cuda/rotation_kernel.py`); what follows defines its result.

    Args:
        heads: of the step's tokens.
        rotation: complex64 [num_tokens, head_dim / 2]; None if queries and keys are rotated.
        cache: of the layer; 8-bit floats are written as `narrowed` makes them.
        slots: int32 [num_tokens], where each token lies in the cache: block × block_size + offset.
        rotated: receives the queries; None to rotate them in place.
    """
    query, key, value = heads
    if rotated is None:
        rotated = query
    elif rotation is None:
        rotated.copy_(query)
    if query.is_cuda:
        from model_service.model.cuda import rotation_kernel  # noqa: PLC0415  # needs Triton

        rotation_kernel.rotate_and_write(heads, rotation, cache, slots, rotated)
        return
    if rotation is not None:
        rotated.copy_(_rotated(query, rotation))
        key = _rotated(key, rotation)
    for new, held in zip((key, value), cache, strict=True):
        entries, written = held.flatten(0, 1), narrowed(new, held.dtype)
        if held.dtype.itemsize == 1:  # PyTorch does not index 8-bit floats
            entries, written = entries.view(torch.uint8), written.view(torch.uint8)
        entries[slots.long()] = written


def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Heads [num_tokens, heads, head_dim], neighbouring features rotated in pairs."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2).to(x.dtype)
