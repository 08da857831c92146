"""Triton kernels for quantized weights on CUDA: products with few rows, conversions in one pass.

Triton is a part of PyTorch's CUDA builds alone, so only `weights_cuda.py` imports this file, and
only where Triton is found. Each function here has a plain counterpart in PyTorch that defines what
it computes. Tiles are chosen by the shape alone and nothing is tuned at run time: every replica
adds up in the same order, and no first request waits for a tuner.
"""

import os
import shutil

import torch
import triton
import triton.language as tl

from model_service.model.weights.quantization import FP8, GROUP_SIZE
from serving.errors import StartError

_FP8_MAX = tl.constexpr(448.0)
_GROUP_SIZE = tl.constexpr(GROUP_SIZE)
_INPUTS_AT_ONCE = 256  # of a row, by a program: 256 bytes of codes, two lines of the cache
_LEAST_INPUTS = 32
_ROW_TILES = (16, 32, 64)  # a matrix unit's least, and what still leaves registers for the codes
_PROCESSORS = 132  # of an H200
_ROW_BLOCK = 2048
_UNPACKED_BLOCK = 1024


def can_multiply(codes: torch.Tensor) -> bool:
    """Whether `multiply` takes a weight of this shape: its rows must consist of whole tiles."""
    return codes.shape[1] % _LEAST_INPUTS == 0


def multiply(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The product x · (codes × scales)ᵀ; each code is read once for every 64 rows.

    The codes become x's dtype, in which they are exact, in registers; sums are float32.

    Args:
        x: [rows, inputs] float16 or bfloat16.
        codes: [outputs, inputs] int8 or float8_e4m3fn.
        scales: [outputs] float32.

    Returns:
        [rows, outputs] in x's dtype.
    """
    x = x.contiguous()
    rows, inputs = x.shape
    outputs = len(codes)
    product = x.new_empty(rows, outputs)
    at_once, row_tile, output_tile, warps = tiles(rows, outputs, inputs)
    grid = (triton.cdiv(rows, row_tile), triton.cdiv(outputs, output_tile))
    _multiply[grid](
        x,
        codes,
        scales,
        product,
        rows,
        outputs,
        inputs,
        ROWS=row_tile,
        OUTPUTS=output_tile,
        INPUTS=at_once,
        num_warps=warps,
        num_stages=4,
    )
    return product


def require_compiler() -> None:
    """Raises StartError where Triton cannot compile what starts its kernels."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise StartError(
            "quantized weights on CUDA need a C compiler, with which Triton makes their kernels: "
            "install gcc or clang, or name one in CC"
        )


def compile_for(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, most_rows: int
) -> None:
    """Has `multiply` compiled for this weight and up to `most_rows` activations of `dtype`."""
    require_compiler()
    for rows in (tile for tile in _ROW_TILES if tile <= most_rows):
        multiply(torch.zeros(rows, codes.shape[1], dtype=dtype, device=codes.device), codes, scales)


def tiles(rows: int, outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """Inputs, rows and outputs of a tile, and the warps that compute it."""
    at_once = _INPUTS_AT_ONCE
    while inputs % at_once:
        at_once //= 2
    row_tile = next((tile for tile in _ROW_TILES if rows <= tile), _ROW_TILES[-1])
    if row_tile > _ROW_TILES[0]:
        # x is read again for every tile of outputs: the wider, the less of it.
        return min(at_once, 128), row_tile, 64 if outputs // 64 >= _PROCESSORS else 32, 4
    # Two programs on every processor at least, or too few bytes are under way.
    if outputs // 32 < 2 * _PROCESSORS:
        return at_once, row_tile, 16, 2
    return at_once, row_tile, 32, 4


# Compiled anew for a number of rows that 16 divides, a first request would wait for it.
@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    product: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    # A tile of x is more bytes than its codes: of few rows most are not there, and must not be read
    # again and again from the second-level cache, as the last row would be in their place.
    there = (row < rows)[:, None]
    # Outputs beyond the last are few, and not stored: their loads need no mask.
    known_output = tl.where(output < outputs, output, 0)
    x_places = x + row[:, None] * inputs + column[None, :]
    code_places = codes + known_output[None, :].to(tl.int64) * inputs + column[:, None]
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, inputs, INPUTS):
        values = tl.load(x_places + start, mask=there, other=0.0)
        weights = tl.load(code_places + start).to(values.dtype)
        sums = tl.dot(values, weights, sums)
    scaled = sums * tl.load(scales + known_output)[None, :]
    places = product + row[:, None].to(tl.int64) * outputs + output[None, :]
    inside = there & (output < outputs)[None, :]
    tl.store(places, scaled.to(product.dtype.element_ty), mask=inside)


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantization.fp8_rows` in one kernel: codes [rows, columns], scales [rows]."""
    x = x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    _fp8_rows[(rows,)](x, codes, scales, columns, BLOCK=_ROW_BLOCK, num_warps=8)
    return codes, scales


@triton.jit
def _fp8_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    peaks = tl.zeros((BLOCK,), dtype=tl.float32)
    unknown = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        values = tl.load(x + row * columns + start + column, mask=inside, other=0.0)
        size = tl.abs(values.to(tl.float32))
        peaks = tl.maximum(peaks, size)
        unknown |= (size != size).to(tl.int32)  # noqa: PLR0124  # NaN, which a maximum drops
    peak = tl.where(tl.max(unknown, axis=0) > 0, float("nan"), tl.max(peaks, axis=0))
    scale = peak / _FP8_MAX
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        values = tl.load(x + row * columns + start + column, mask=inside, other=0.0)
        code = (values.to(tl.float32) / divisor).to(codes.dtype.element_ty)
        tl.store(codes + row * columns + start + column, code, mask=inside)
    tl.store(scales + row, scale)


def unpack_int4(tiles_: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`weights_cuda.dequantize_tinygemm` in one kernel: [outputs, inputs] bfloat16."""
    octets, blocks, _, pairs = tiles_.shape
    outputs, inputs = 8 * octets, 32 * blocks * pairs
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=tiles_.device)
    grid = (outputs, triton.cdiv(inputs, _UNPACKED_BLOCK))
    _unpack_int4[grid](
        tiles_, scales, weight, outputs, inputs, PAIRS=pairs, BLOCK=_UNPACKED_BLOCK, num_warps=4
    )
    return weight


@triton.jit
def _unpack_int4(
    tiles_: tl.tensor,
    scales: tl.tensor,
    weight: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    output = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inputs
    # The layout that `weights_cuda.tinygemm_codes` describes, from the weight to its code.
    block = (output // 8) * (inputs // (32 * PAIRS)) + column // (32 * PAIRS)
    lane = (output % 8) * 4 + (column % 8) // 2
    word = (block * 32 + lane) * PAIRS + column // 32 % PAIRS
    shift = 4 * (column % 32 // 8) + 16 * (column % 2)
    code = (tl.load(tiles_ + word, mask=inside, other=0) >> shift) & 15
    group = ((column // _GROUP_SIZE) * outputs + output) * 2
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(scales + group + 1, mask=inside, other=0.0).to(tl.float32)
    value = (code - 8).to(tl.float32) * scale + zero
    place = weight + output.to(tl.int64) * inputs + column
    tl.store(place, value.to(tl.bfloat16), mask=inside)
