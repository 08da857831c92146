"""The Triton kernels of `attention.py`: splits of a context, and their joining."""

import triton
import triton.language as tl

from model_service.model.cuda.rotation_kernel import widened


@triton.jit(do_not_specialize=["first_tile", "splits"])
def attend_tile(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    output: tl.tensor,
    parts: tl.tensor,
    scales: tl.tensor,
    tiles: tl.tensor,
    pages: tl.tensor,
    first_tile: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NARROWED: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Attention of a tile of tokens over one head of keys, and the queries that share it.

    Args:
        query: [tokens, heads, HEAD_DIM].
        keys: of the cache, [slots, KV_HEADS, HEAD_DIM]; uint8 codes if NARROWED.
        values: likewise.
        output: [tokens, heads, HEAD_DIM], of joined splits.
        parts: [tokens, heads, splits, HEAD_DIM] float32, sums of splits apart.
        scales: [tokens, heads, splits, 2] float32, the largest score and the sum of each.
        tiles: as `AttentionStep.tiles`, from `first_tile` on.
        pages: as `AttentionStep.pages`.
        first_tile: of the launch.
        splits: how many of a tile are computed apart, one in a program; 0 if they are joined.
        KV_HEADS: heads of keys.
        SHARED: queries that share one.
        HEAD_DIM: features of a head.
        BLOCK_SIZE: tokens of a block of the cache.
        NARROWED: whether the cache holds e4m3.
        SCALE: of scores, so that weights are powers of two.
        ROWS: queries of a tile, at least SHARED.
        DIM: HEAD_DIM or the next power of two.
        KEYS: that are read at once.
        SPLIT: tokens of a split.
    """
    tile = tiles + (first_tile + tl.program_id(0)) * 4
    first_token, count = tl.load(tile), tl.load(tile + 1)
    visible, own_pages = tl.load(tile + 2), pages + tl.load(tile + 3)
    context = visible + count - 1  # what the tile's last token sees
    begin = tl.program_id(2)
    end = (context + SPLIT - 1) // SPLIT
    if splits > 0:
        end = tl.minimum(end, begin + 1)
    kv_head = tl.program_id(1)
    place = tl.arange(0, ROWS)
    token = place // SHARED
    head = kv_head * SHARED + place % SHARED
    feature = tl.arange(0, DIM)
    row = (first_token + token).to(tl.int64) * (KV_HEADS * SHARED) + head
    stored = (token < count)[:, None] & (feature < HEAD_DIM)[None, :]
    offsets = row[:, None] * HEAD_DIM + feature[None, :]
    queries = tl.load(query + offsets, mask=stored, other=0.0)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    sums = tl.zeros((ROWS, DIM), dtype=tl.float32)
    for split in range(begin, end):
        own_peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        own_total = tl.zeros((ROWS,), dtype=tl.float32)
        own_sums = tl.zeros((ROWS, DIM), dtype=tl.float32)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, context), KEYS):
            position = start + tl.arange(0, KEYS)
            known = position < context
            page = tl.load(own_pages + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
            slot = page * BLOCK_SIZE + position % BLOCK_SIZE
            entry = (slot * KV_HEADS + kv_head) * HEAD_DIM
            # Features beyond the last and unwritten slots are zeros: what lies there may be NaN.
            read = known[:, None] & (feature < HEAD_DIM)[None, :]
            key = tl.load(keys + entry[:, None] + feature[None, :], mask=read, other=0)
            value = tl.load(values + entry[:, None] + feature[None, :], mask=read, other=0)
            if NARROWED:
                key = widened(key).to(queries.dtype)
                value = widened(value).to(queries.dtype)
            scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * SCALE
            seen = position[None, :] < (visible + token)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
            new_peak = tl.maximum(own_peak, tl.max(scores, axis=1))
            finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weights = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(own_peak - finite)
            own_total = own_total * shrink + tl.sum(weights, axis=1)
            own_sums = own_sums * shrink[:, None]
            own_sums = tl.dot(weights.to(value.dtype), value, own_sums, input_precision="ieee")
            own_peak = new_peak
        peak, total, sums = _joined(peak, total, sums, own_peak, own_total, own_sums)
    if splits > 0:
        if begin < end:
            part = row * splits + begin
            exists = token < count
            tl.store(parts + part[:, None] * HEAD_DIM + feature[None, :], sums, mask=stored)
            tl.store(scales + part * 2, peak, mask=exists)
            tl.store(scales + part * 2 + 1, total, mask=exists)
    else:
        result = sums / total[:, None]
        tl.store(output + offsets, result.to(output.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["splits"])
def join_splits(
    parts: tl.tensor,
    scales: tl.tensor,
    output: tl.tensor,
    tiles: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Joins the splits of one token and head, in their order; arguments as of `attend_tile`."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    feature = tl.arange(0, DIM)[None, :]
    one = tl.arange(0, 1)
    peak = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    sums = tl.zeros((1, DIM), dtype=tl.float32)
    context = tl.load(tiles + tl.program_id(0) * 4 + 2)
    for split in range((context + SPLIT - 1) // SPLIT):
        part = row * splits + split
        own_peak = tl.load(scales + part * 2 + one)
        own_total = tl.load(scales + part * 2 + 1 + one)
        own = tl.load(parts + part * HEAD_DIM + feature, mask=feature < HEAD_DIM, other=0.0)
        peak, total, sums = _joined(peak, total, sums, own_peak, own_total, own)
    result = (sums / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + row * HEAD_DIM + feature, result, mask=feature < HEAD_DIM)


@triton.jit
def _joined(
    peak: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    own_peak: tl.tensor,
    own_total: tl.tensor,
    own_sums: tl.tensor,
) -> tl.tensor:
    """A context's softmax up to one split, and that split's own: largest score, sum, and sums.

    A split of which a row sees nothing leaves the row as it is, to the last bit.
    """
    new_peak = tl.maximum(peak, own_peak)
    finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink, own_shrink = tl.exp2(peak - finite), tl.exp2(own_peak - finite)
    total = total * shrink + own_total * own_shrink
    sums = sums * shrink[:, None] + own_sums * own_shrink[:, None]
    return new_peak, total, sums
