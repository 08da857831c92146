"""The Triton kernel of `products.py`: a tile of rows and outputs over all inputs.

The same kernel does the rest of a layer around a product: the norm of the residual stream before
it; behind it rotation and the write to the cache, SwiGLU, or the addition to the stream. Sums stay
float32 until then and are rounded once. Fused multiply-adds are off, because the compiler might
choose others for another tile.
"""

import triton
import triton.language as tl

from model_service.model.cuda.norm_kernel import SQUARED, inverse_rms, sums_of_squares
from model_service.model.cuda.rotation_kernel import narrowed
from model_service.model.cuda.tiled_weight import GROUP

_GROUP = tl.constexpr(GROUP)
_SQUARED = tl.constexpr(SQUARED)


# Otherwise a first request with a number of rows that 16 divides would wait for a compilation.
@triton.jit(do_not_specialize=["rows"])
def multiply_tile(
    x: tl.tensor,
    norm_weight: tl.tensor,
    squares: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    product: tl.tensor,
    angles: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    EPS: tl.constexpr,
    NORMS: tl.constexpr,
    SCALES: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    ADDS: tl.constexpr,
    GATES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    NARROWS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    """A tile of the product x · weightᵀ, and of what follows it.

    Args:
        x: [rows, inputs].
        norm_weight: [inputs], if the rows are normed.
        squares: [rows, dim / SQUARED] float32: read if the rows are normed, else written.
        codes: as `TiledWeight.codes`; for SwiGLU of 2 × outputs, gates first.
        scales: as `TiledWeight.scales`.
        product: [rows, outputs]; for heads [rows, QUERIES].
        angles: as `products.Heads` has them, likewise `keys`, `values` and `slots`.
        keys: of the cache.
        values: of the cache.
        slots: of the rows.
        rows: of x.
        outputs: of a row.
        inputs: of the weight.
        EPS: of the norm.
        NORMS: whether rows are normed.
        SCALES: whether codes have a scale for each output.
        FOUR_BITS: whether codes have 4 bits.
        ADDS: whether the product is added to what is there.
        GATES: whether outputs are gated by SwiGLU.
        QUERIES: outputs that are queries.
        KEYS: outputs that are keys, and as many that are values.
        PAIRS: pairs of features of a head; 0 if the outputs are no heads.
        NARROWS: whether the cache holds e4m3.
        ROWS: of a tile.
        OUTPUTS: of a tile.
        INPUTS: of a tile.
    """
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    # Without a mask, loads of rows that do not exist would fill a tile of few rows.
    row_exists = (row < rows)[:, None]
    # Outputs beyond the last are few and not stored, so their loads need no mask.
    loaded = tl.where(output < outputs, output, 0)
    factor = tl.zeros((ROWS,), dtype=tl.float32)
    if NORMS:
        factor = inverse_rms(squares, row, row_exists, inputs, EPS, ROWS)
    weights = outputs * 2 if GATES else outputs  # outputs of the matrix
    x_rows = x + row[:, None] * inputs
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    up_sums = sums
    for start in range(0, inputs, INPUTS):
        if FOUR_BITS:
            half: tl.constexpr = INPUTS // 2
            column = start + tl.arange(0, half)
            low = _activations(x_rows, norm_weight, factor, row_exists, column, NORMS)
            high = _activations(x_rows, norm_weight, factor, row_exists, column + half, NORMS)
            group = start // _GROUP
            sums = _add_group(sums, low, high, codes, scales, group, weights, loaded)
            if GATES:
                up = loaded + outputs
                up_sums = _add_group(up_sums, low, high, codes, scales, group, weights, up)
        else:
            column = start + tl.arange(0, INPUTS)
            own = _activations(x_rows, norm_weight, factor, row_exists, column, NORMS)
            sums = _add_tile(sums, own, codes, column, inputs, loaded)
            if GATES:
                up_sums = _add_tile(up_sums, own, codes, column, inputs, loaded + outputs)
    if SCALES:
        sums = sums * tl.load(scales + loaded)[None, :]
        if GATES:
            up_sums = up_sums * tl.load(scales + outputs + loaded)[None, :]
    if GATES:
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
    inside = row_exists & (output < outputs)[None, :]
    if PAIRS > 0:
        turned = _rotated(sums, angles, row, row_exists, QUERIES + KEYS, PAIRS, ROWS, OUTPUTS)
        heads = turned.to(product.dtype.element_ty)
        place = row[:, None] * QUERIES + output[None, :]
        tl.store(product + place, heads, mask=inside & (output < QUERIES)[None, :])
        slot = tl.load(slots + row[:, None], mask=row_exists, other=0).to(tl.int64)
        held = narrowed(heads) if NARROWS else heads
        _store_in_cache(held, keys, values, slot, output - QUERIES, inside, KEYS)
    else:
        pointers = product + row[:, None] * outputs + output[None, :]
        if ADDS:
            sums += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        result = sums.to(product.dtype.element_ty)
        tl.store(pointers, result, mask=inside)
        if ADDS:
            own_squares = sums_of_squares(tl.where(inside, result, 0.0), ROWS, OUTPUTS)
            count = outputs // _SQUARED
            group = tl.program_id(0) * (OUTPUTS // _SQUARED) + tl.arange(0, OUTPUTS // _SQUARED)
            place = row[:, None] * count + group[None, :]
            tl.store(squares + place, own_squares, mask=row_exists & (group < count)[None, :])


@triton.jit
def _store_in_cache(
    held: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slot: tl.tensor,
    key: tl.tensor,
    inside: tl.tensor,
    KEYS: tl.constexpr,
) -> None:
    """Stores keys and values of a tile; `key` is negative for queries, from KEYS on for values."""
    is_key = (key >= 0) & (key < KEYS)
    tl.store(keys + slot * KEYS + key[None, :], held, mask=inside & is_key[None, :])
    value = key - KEYS
    tl.store(values + slot * KEYS + value[None, :], held, mask=inside & (value >= 0)[None, :])


@triton.jit
def _activations(
    x_rows: tl.tensor,
    norm_weight: tl.tensor,
    factor: tl.tensor,
    row_exists: tl.tensor,
    column: tl.tensor,
    NORMS: tl.constexpr,
) -> tl.tensor:
    """Some columns of x, normed if the stream is."""
    values = tl.load(x_rows + column[None, :], mask=row_exists, other=0.0)
    if NORMS:
        weight = tl.load(norm_weight + column).to(tl.float32)
        scaled = values.to(tl.float32) * factor[:, None] * weight[None, :]
        values = scaled.to(values.dtype)
    return values


@triton.jit
def _add_tile(
    sums: tl.tensor,
    values: tl.tensor,
    codes: tl.tensor,
    column: tl.tensor,
    inputs: tl.tensor,
    output: tl.tensor,
) -> tl.tensor:
    """Adds the products of some inputs; codes are exact in the activations' type."""
    weights = tl.load(codes + output[None, :].to(tl.int64) * inputs + column[:, None])
    return tl.dot(values, weights.to(values.dtype), sums, input_precision="ieee")


@triton.jit
def _add_group(
    sums: tl.tensor,
    low_values: tl.tensor,
    high_values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    group: tl.tensor,
    weights: tl.tensor,
    output: tl.tensor,
) -> tl.tensor:
    """Adds the products of a group of 4-bit codes, which become numbers of the activations' type.

    They are rounded to it, as `Int4Weight.dequantize` followed by a conversion does.
    """
    half: tl.constexpr = _GROUP // 2
    first = (group * weights + output).to(tl.int64) * half
    packed = tl.load(codes + first[None, :] + tl.arange(0, half)[:, None])
    own = scales + group * 2 * weights + output
    scale = tl.load(own).to(tl.float32)[None, :]
    minimum = tl.load(own + weights).to(tl.float32)[None, :]
    low = ((packed & 15).to(tl.float32) * scale + minimum).to(low_values.dtype)
    high = ((packed >> 4).to(tl.float32) * scale + minimum).to(low_values.dtype)
    sums = tl.dot(low_values, low, sums, input_precision="ieee")
    return tl.dot(high_values, high, sums, input_precision="ieee")


@triton.jit
def _rotated(
    sums: tl.tensor,
    angles: tl.tensor,
    row: tl.tensor,
    row_exists: tl.tensor,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> tl.tensor:
    """The products with neighbours rotated in pairs, up to the output TURNED: no values."""
    pair = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
    turns = row_exists & (2 * pair < TURNED)[None, :]
    place = angles + row[:, None] * (2 * PAIRS) + 2 * (pair % PAIRS)[None, :]
    cosine = tl.load(place, mask=turns, other=1.0)
    sine = tl.load(place + 1, mask=turns, other=0.0)
    even, odd = tl.split(tl.reshape(sums, (ROWS, OUTPUTS // 2, 2)))
    first = tl.where(turns, even * cosine - odd * sine, even)
    second = tl.where(turns, even * sine + odd * cosine, odd)
    return tl.reshape(tl.join(first, second), (ROWS, OUTPUTS))
