"""`rotation.rotate_and_write` as one Triton kernel.

A program reads some heads of one token, all of them queries, keys or values. 8-bit floats are made
from the bits of float32 by integer operations, as in PyTorch's c10/util/Float8_e4m3fn.h: so the
codes are the same on every card, also on those without such a type.
"""

import torch
import triton
import triton.language as tl

_HEADS = 4  # of a program, which is one warp: 16 features of 128 in each thread


def rotate_and_write(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotation: torch.Tensor | None,
    cache: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    rotated: torch.Tensor,
) -> None:
    """As `rotation.rotate_and_write`, on the device; writes `rotated` only with a rotation."""
    query, key, value = heads
    tokens, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    narrows = cache[0].dtype.itemsize == 1
    keys, values = (each.view(torch.uint8) if narrows else each for each in cache)
    angles = query if rotation is None else torch.view_as_real(rotation)
    groups = triton.cdiv(queries, _HEADS) + 2 * triton.cdiv(kv_heads, _HEADS)
    _rotate_and_write[(tokens, groups)](
        query,
        key,
        value,
        angles,
        keys,
        values,
        slots,
        rotated,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        rotated.stride(0),
        QUERIES=queries,
        KV_HEADS=kv_heads,
        HEADS=_HEADS,
        PAIRS=head_dim // 2,
        ROTATES=rotation is not None,
        NARROWS=narrows,
        num_warps=1,
    )


@triton.jit
def _rotate_and_write(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    angles: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    rotated: tl.tensor,
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    rotated_stride: tl.tensor,
    QUERIES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROTATES: tl.constexpr,
    NARROWS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups: tl.constexpr = (QUERIES + HEADS - 1) // HEADS
    key_groups: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    if group < query_groups:
        if ROTATES:
            head = group * HEADS + tl.arange(0, HEADS)[:, None]
            place = head * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
            x = tl.load(query + token * query_stride + place, mask=head < QUERIES, other=0.0)
            x = _rotated(x, angles, token, HEADS, PAIRS)
            tl.store(rotated + token * rotated_stride + place, x, mask=head < QUERIES)
    else:
        slot = tl.load(slots + token).to(tl.int64) * (KV_HEADS * 2 * PAIRS)
        group -= query_groups
        first = tl.where(group < key_groups, group, group - key_groups) * HEADS
        head = first + tl.arange(0, HEADS)[:, None]
        place = head * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
        exists = head < KV_HEADS
        if group < key_groups:
            x = tl.load(key + token * key_stride + place, mask=exists, other=0.0)
            if ROTATES:
                x = _rotated(x, angles, token, HEADS, PAIRS)
            tl.store(keys + slot + place, narrowed(x) if NARROWS else x, mask=exists)
        else:
            x = tl.load(value + token * value_stride + place, mask=exists, other=0.0)
            tl.store(values + slot + place, narrowed(x) if NARROWS else x, mask=exists)


@triton.jit
def _rotated(
    x: tl.tensor, angles: tl.tensor, token: tl.tensor, HEADS: tl.constexpr, PAIRS: tl.constexpr
) -> tl.tensor:
    """Heads [HEADS, 2 × PAIRS], neighbours rotated in pairs by a token's cosines and sines."""
    own = tl.load(angles + token * (2 * PAIRS) + tl.arange(0, 2 * PAIRS))
    cosine, sine = tl.split(tl.reshape(own, (PAIRS, 2)))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (HEADS, PAIRS, 2)))
    cosine, sine = cosine[None, :], sine[None, :]
    both = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(both, (HEADS, 2 * PAIRS)).to(x.dtype)


@triton.jit
def narrowed(x: tl.tensor) -> tl.tensor:
    """The bits of e4m3, rounded to the nearest, ties to even, at most ±448."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    is_nan = size > 0x7F800000
    size = tl.minimum(size, 0x43E00000)  # 448
    # Below 2⁻⁶ the addition of 2¹⁴ shifts the bits into place, rounded by the unit that adds.
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000
    # The exponent's bias goes from 127 to 7; then half of the last bit that stays is added.
    normal = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(is_nan, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def widened(codes: tl.tensor) -> tl.tensor:
    """The float32 numbers of e4m3's bits, without a type that some cards lack."""
    bits = codes.to(tl.int32)
    size = bits & 0x7F
    # The exponent's bias in float32 is larger by 120. A product by a power of two makes up for it,
    # and for the numbers that have no leading one.
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(bits > 0x7F, -value, value)
