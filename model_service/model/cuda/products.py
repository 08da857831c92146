"""Products of activations and weights that sum in one order for any number of rows.

One program computes a tile of rows and outputs over all inputs, from the first tile of inputs to
the last, so no sum is split. Few and many rows take tiles of different heights and widths. But the
tile over the inputs and the instruction of the matrix units are the same, so an element passes the
same chain of additions in all of them: test_invariant_kernels.py compares the compiled code. Each
function is one launch of `product_kernel.py`.
"""

from dataclasses import dataclass

import torch
import triton

from model_service.model.cuda.norm_kernel import SQUARED
from model_service.model.cuda.product_kernel import multiply_tile
from model_service.model.cuda.tiled_weight import GROUP, TiledWeight

FEW_ROWS = 16  # a matrix unit's smallest tile
MANY_ROWS = 32  # from 64 on, the compiler takes Hopper's wider instruction
_PROCESSORS = 132  # of an H200


@dataclass(frozen=True, slots=True)
class Normed:
    """Rows of the residual stream that are normed before they are multiplied.

    Attributes:
        stream: [rows, dim].
        squares: [rows, dim / SQUARED] float32, sums of squares of the stream.
        weight: [dim], of the norm.
        eps: of the norm.
    """

    stream: torch.Tensor
    squares: torch.Tensor
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Heads:
    """Where the product of queries, keys and values goes.

    Attributes:
        angles: float32 [rows, head_dim / 2, 2], cosine and sine of each pair of features.
        keys: of the layer's cache, [blocks, block_size, kv_heads, head_dim].
        values: likewise.
        slots: int32 [rows], where each row lies in the cache: block × block_size + offset.
    """

    angles: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys."""
        return self.keys.shape[-2] * self.keys.shape[-1]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tile of one program."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def multiply(x: torch.Tensor, weight: TiledWeight) -> torch.Tensor:
    """X · weightᵀ [rows, outputs] for x [rows, inputs], in x's dtype."""
    product = x.new_empty(len(x), weight.outputs)
    _launch(x.contiguous(), None, weight, product, weight.outputs)
    return product


def multiply_gated(x: Normed, weight: TiledWeight) -> torch.Tensor:
    """SwiGLU of the products, silu(gate) × up [rows, hidden].

    The first half of the weight's outputs are gates.
    """
    hidden = weight.outputs // 2
    gated = x.stream.new_empty(len(x.stream), hidden)
    _launch(x.stream, x, weight, gated, hidden, GATES=True)
    return gated


def add_product(x: torch.Tensor, weight: TiledWeight, stream: torch.Tensor) -> torch.Tensor:
    """Adds x · weightᵀ to the residual stream [rows, outputs] in place.

    Returns:
        The stream's sums of squares [rows, outputs / SQUARED] float32.
    """
    rows, dim = stream.shape
    squares = torch.empty(rows, dim // SQUARED, dtype=torch.float32, device=x.device)
    _launch(x, None, weight, stream, dim, squares=squares, ADDS=True)
    return squares


def write_heads(
    x: Normed, weight: TiledWeight, heads: Heads, query: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies, rotates queries and keys, and writes keys and values to the cache.

    Returns:
        The rotated queries [rows, heads × head_dim]: `query`, or new memory.
    """
    if query is None:
        query = x.stream.new_empty(len(x.stream), weight.outputs - 2 * heads.kv_width)
    _launch(x.stream, x, weight, query, weight.outputs, heads=heads)
    return query


def tiles(rows: int, outputs: int, weight: TiledWeight, *, normed: bool) -> Tiles:
    """The tile for a number of rows; over the inputs it is the same for every number."""
    width = weight.codes.itemsize
    if weight.in_four_bits:
        inputs = GROUP
    else:
        # Norming a tile takes registers for each of its inputs.
        inputs = {1: 128 if normed else 256, 2: 128, 4: 32}[width]
        while weight.inputs % inputs:
            inputs //= 2
    if rows > FEW_ROWS and width < 4:
        # Every tile of outputs reads x again, and every tile of rows the weights.
        return Tiles(MANY_ROWS, 64, inputs, 4, 3)
    stages = 6 if weight.in_four_bits else 4
    # With fewer than two programs on every processor, too few bytes are in flight.
    if outputs // 32 < 2 * _PROCESSORS:
        return Tiles(FEW_ROWS, 16, inputs, 2, stages)
    return Tiles(FEW_ROWS, 32, inputs, 4, stages)


def _launch(
    x: torch.Tensor,
    normed: Normed | None,
    weight: TiledWeight,
    product: torch.Tensor,
    outputs: int,
    *,
    heads: Heads | None = None,
    squares: torch.Tensor | None = None,
    **epilogue: bool,
) -> None:
    """Launches the kernel; `outputs` are the products of a row, or pairs of them for SwiGLU."""
    rows = len(x)
    if not rows:
        return
    tile = tiles(rows, outputs, weight, normed=normed is not None)
    # Pointers that a variant does not read are any.
    if normed is not None:
        squares = normed.squares
    keys, values = (product, product) if heads is None else (heads.keys, heads.values)
    narrows = keys.dtype.itemsize == 1
    if narrows:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    grid = (triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, tile.rows))
    multiply_tile[grid](
        x,
        product if normed is None else normed.weight,
        product if squares is None else squares,
        weight.codes,
        product if weight.scales is None else weight.scales,
        product,
        product if heads is None else heads.angles,
        keys,
        values,
        product if heads is None else heads.slots,
        rows,
        outputs,
        weight.inputs,
        EPS=0.0 if normed is None else normed.eps,
        NORMS=normed is not None,
        SCALES=weight.scales is not None and not weight.in_four_bits,
        FOUR_BITS=weight.in_four_bits,
        ADDS=epilogue.get("ADDS", False),
        GATES=epilogue.get("GATES", False),
        QUERIES=0 if heads is None else product.shape[1],
        KEYS=0 if heads is None else heads.kv_width,
        PAIRS=0 if heads is None else heads.keys.shape[-1] // 2,
        NARROWS=narrows,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
