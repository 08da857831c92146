"""RMS norm in Triton: alone, and in the two parts that kernels of products take in.

The kernel that writes the residual stream also writes the sums of squares of every `SQUARED`
numbers, and the kernel of the next product adds these up before it multiplies. So it need not read
the stream twice, and it multiplies by rows that are normed and rounded as `PlainOperations` does:
to scale the finished products instead would round x × weight, which may overflow in float16. Sums
are made by trees of additions that the source spells out, so no compiler's layout of a tile changes
their order.
"""

import torch
import triton
import triton.language as tl

SQUARED = 16  # neighbours of a row whose squares are summed
_SUMS_AT_ONCE = tl.constexpr(64)
_LOG_SUMS_AT_ONCE = tl.constexpr(6)
_SQUARED = tl.constexpr(SQUARED)
_LOG_SQUARED = tl.constexpr(4)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`Operations.norm` of x [rows, dim]; a row's bits depend on that row alone."""
    normed = torch.empty_like(x)
    dim = x.shape[1]
    if len(x):
        block = triton.next_power_of_2(dim)
        _norm[(len(x),)](
            x, weight, normed, dim, EPS=eps, BLOCK=block, num_warps=4, enable_fp_fusion=False
        )
    return normed


def add(stream: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
    """Adds `part` to the residual stream in place; both [rows, dim].

    Args:
        stream: contiguous.
        part: likewise; None adds nothing.

    Returns:
        The sums of squares [rows, dim / SQUARED] float32 that the next product needs.
    """
    rows, dim = stream.shape
    squares = torch.empty(rows, dim // SQUARED, dtype=torch.float32, device=stream.device)
    if rows:
        _add[(rows,)](
            stream,
            stream if part is None else part,
            squares,
            dim,
            ADDS=part is not None,
            BLOCK=max(SQUARED, triton.next_power_of_2(dim)),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return squares


@triton.jit
def _norm(
    x: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    dim: tl.tensor,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    values = tl.load(x + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=0) / dim + EPS)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = (values * factor * weights).to(normed.dtype.element_ty)
    tl.store(normed + row * dim + column, result, mask=inside)


@triton.jit
def _add(
    stream: tl.tensor,
    part: tl.tensor,
    squares: tl.tensor,
    dim: tl.tensor,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    values = tl.load(stream + row * dim + column, mask=inside, other=0.0)
    if ADDS:
        more = tl.load(part + row * dim + column, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(stream.dtype.element_ty)
        tl.store(stream + row * dim + column, values, mask=inside)
    sums = sums_of_squares(tl.reshape(values, (1, BLOCK)), 1, BLOCK)
    place = tl.arange(0, BLOCK // _SQUARED)[None, :]
    count = dim // _SQUARED
    tl.store(squares + row * count + place, sums, mask=place < count)


@triton.jit
def sums_of_squares(values: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """[ROWS, COLUMNS / SQUARED] float32 of values [ROWS, COLUMNS] of any type."""
    wide = values.to(tl.float32)
    return _added_up(wide * wide, ROWS, COLUMNS, _LOG_SQUARED)


@triton.jit
def inverse_rms(
    squares: tl.tensor,
    row: tl.tensor,
    row_exists: tl.tensor,
    dim: tl.tensor,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """[ROWS] float32, by which rows [ROWS] of the stream are to be multiplied.

    Args:
        squares: where `add` or a product has put the sums of squares.
        row: the rows' numbers, int64.
        row_exists: which of them are there, [ROWS, 1].
        dim: numbers of a row.
        EPS: of the norm.
        ROWS: of a tile.
    """
    count = dim // _SQUARED
    sums = tl.zeros((ROWS, _SUMS_AT_ONCE), dtype=tl.float32)
    for start in range(0, count, _SUMS_AT_ONCE):
        place = start + tl.arange(0, _SUMS_AT_ONCE)[None, :]
        inside = row_exists & (place < count)
        sums += tl.load(squares + row[:, None] * count + place, mask=inside, other=0.0)
    total = tl.reshape(_added_up(sums, ROWS, _SUMS_AT_ONCE, _LOG_SUMS_AT_ONCE), (ROWS,))
    return tl.rsqrt(total / dim + EPS)


@triton.jit
def _added_up(
    values: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr
) -> tl.tensor:
    """Sums of 2^LEVELS neighbours, [ROWS, COLUMNS / 2^LEVELS]: a pair at each level."""
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(values, (ROWS, COLUMNS >> (level + 1), 2))
        first, second = tl.split(pairs)
        values = first + second
    return values
