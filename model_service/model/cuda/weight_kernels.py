"""Triton kernels for quantized weights on CUDA: products with few rows, conversions in one pass.

Only PyTorch's CUDA builds include Triton, so only `weights/cuda.py` imports this file, and only if
Triton is installed. Each function here has a counterpart in plain PyTorch that defines its result.
Tiles depend on the shape and are not tuned at run time, so that every replica adds up in the same
order and no first request waits for a tuner.
"""

import os
import shutil

import torch
import triton
import triton.language as tl

from model_service.model.weight_sizes import GROUP_SIZE
from serving.errors import StartError

_FP8_MAX = tl.constexpr(448.0)
_GROUP_SIZE = tl.constexpr(GROUP_SIZE)
_INPUT_TILE = 256  # inputs of a row that a program reads at once: two cache lines of codes
_MIN_INPUTS = 32
_ROW_TILES = (16, 32, 64)  # from a matrix unit's smallest to as many as leave registers for codes
_PROCESSORS = 132  # of an H200
_ROW_BLOCK = 2048
_UNPACKED_BLOCK = 1024


def can_multiply(codes: torch.Tensor) -> bool:
    """Whether `multiply` supports this shape: rows must consist of whole tiles."""
    return codes.shape[1] % _MIN_INPUTS == 0


def multiply(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The product x · (codes × scales)ᵀ; each code is read once for every 64 rows.

    Codes are converted in registers to x's dtype, in which they are exact. Sums are float32.

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
    input_tile, row_tile, output_tile, warps = tiles(rows, outputs, inputs)
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
        INPUTS=input_tile,
        num_warps=warps,
        num_stages=4,
    )
    return product


def require_compiler() -> None:
    """Raises StartError if Triton cannot compile the code that starts its kernels."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise StartError(
            "quantized weights on CUDA need a C compiler, with which Triton makes their kernels: "
            "install gcc or clang, or name one in CC"
        )


def compile_for(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, max_rows: int
) -> None:
    """Compiles `multiply` for this weight and up to `max_rows` activations of `dtype`."""
    require_compiler()
    for rows in (tile for tile in _ROW_TILES if tile <= max_rows):
        multiply(torch.zeros(rows, codes.shape[1], dtype=dtype, device=codes.device), codes, scales)


def tiles(rows: int, outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """The inputs, rows and outputs of a tile, and the number of warps that compute it."""
    input_tile = _INPUT_TILE
    while inputs % input_tile:
        input_tile //= 2
    row_tile = next((tile for tile in _ROW_TILES if rows <= tile), _ROW_TILES[-1])
    if row_tile > _ROW_TILES[0]:
        # Every tile of outputs reads x again, so wide tiles read less.
        return min(input_tile, 128), row_tile, 64 if outputs // 64 >= _PROCESSORS else 32, 4
    # With fewer than two programs on every processor, too few bytes are in flight.
    if outputs // 32 < 2 * _PROCESSORS:
        return input_tile, row_tile, 16, 2
    return input_tile, row_tile, 32, 4


# Otherwise a first request with a number of rows that 16 divides would wait for a compilation.
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
    # A tile of x has more bytes than its codes. If there are few rows, most of the tile does not
    # exist; without a mask, loads of the last row would fill it from the second-level cache.
    row_exists = (row < rows)[:, None]
    # Outputs beyond the last are few and not stored, so their loads need no mask.
    loaded_output = tl.where(output < outputs, output, 0)
    x_pointers = x + row[:, None] * inputs + column[None, :]
    code_pointers = codes + loaded_output[None, :].to(tl.int64) * inputs + column[:, None]
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, inputs, INPUTS):
        values = tl.load(x_pointers + start, mask=row_exists, other=0.0)
        weights = tl.load(code_pointers + start).to(values.dtype)
        sums = tl.dot(values, weights, sums)
    scaled = sums * tl.load(scales + loaded_output)[None, :]
    pointers = product + row[:, None].to(tl.int64) * outputs + output[None, :]
    inside = row_exists & (output < outputs)[None, :]
    tl.store(pointers, scaled.to(product.dtype.element_ty), mask=inside)


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantization.fp8_rows` in one kernel: codes [rows, columns], scales [rows]."""
    x = x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
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
    has_nan = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        values = tl.load(x + row * columns + start + column, mask=inside, other=0.0)
        size = tl.abs(values.to(tl.float32))
        peaks = tl.maximum(peaks, size)
        has_nan |= (size != size).to(tl.int32)  # noqa: PLR0124  # because a maximum drops NaN
    peak = tl.where(tl.max(has_nan, axis=0) > 0, float("nan"), tl.max(peaks, axis=0))
    scale = peak / _FP8_MAX
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        values = tl.load(x + row * columns + start + column, mask=inside, other=0.0)
        code = (values.to(tl.float32) / divisor).to(codes.dtype.element_ty)
        tl.store(codes + row * columns + start + column, code, mask=inside)
    tl.store(scales + row, scale)


def unpack_int4(tiles_: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`cuda.dequantize_tinygemm` in one kernel: [outputs, inputs] bfloat16."""
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
    # The code of a weight, in the layout that `cuda.tinygemm_codes` describes.
    block = (output // 8) * (inputs // (32 * PAIRS)) + column // (32 * PAIRS)
    lane = (output % 8) * 4 + (column % 8) // 2
    word = (block * 32 + lane) * PAIRS + column // 32 % PAIRS
    shift = 4 * (column % 32 // 8) + 16 * (column % 2)
    code = (tl.load(tiles_ + word, mask=inside, other=0) >> shift) & 15
    group = ((column // _GROUP_SIZE) * outputs + output) * 2
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(scales + group + 1, mask=inside, other=0.0).to(tl.float32)
    value = (code - 8).to(tl.float32) * scale + zero
    tl.store(weight + output.to(tl.int64) * inputs + column, value.to(tl.bfloat16), mask=inside)
