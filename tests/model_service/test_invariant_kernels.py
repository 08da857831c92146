"""The kernels that are batch-invariant on CUDA, in Triton's interpreter: each equals its definition
in plain PyTorch, and a row has the same bits in every company.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model_service.model.attention.backend import CacheShape, SequenceSpan
from model_service.model.attention.page_tables import page_tables, query_tiles
from tests.model_service.conftest import spread

triton: Any = pytest.importorskip("triton", reason="Triton is not installed")
products: Any = pytest.importorskip("model_service.model.cuda.products")
attention: Any = pytest.importorskip("model_service.model.cuda.attention")
norm_kernel: Any = pytest.importorskip("model_service.model.cuda.norm_kernel")
definitions: Any = pytest.importorskip("tests.model_service.invariant_kernels")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="kernels run on the GPU here, or the interpreter is older than NumPy's newest",
)
HALF = torch.float16  # the interpreter multiplies no bfloat16
KINDS = [*((name, HALF) for name in definitions.FORMAT_NAMES), ("none", torch.float32)]
DIM = 128
HEADS, KV_HEADS, HEAD_DIM = 3, 1, 16
BLOCK_SIZE = 4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def assert_near(found: torch.Tensor, defined: torch.Tensor) -> None:
    """To the rounding of the type and of float32 sums."""
    step = 2**-10 if found.dtype == HALF else 2**-20
    assert (found.float() - defined).abs().max() <= step * defined.abs().max()


class Layer:
    """A product's input and all that its kernels read beside it."""

    def __init__(self, quantization: str, dtype: torch.dtype, rows: int) -> None:
        self.stream = torch.randn(rows, DIM).to(dtype)
        self.norm_weight = torch.rand(DIM).to(dtype)
        self.normed = definitions.normed(self.stream, self.norm_weight)
        self.rotation = torch.polar(torch.ones(rows, 8), torch.randn(rows, 8))
        self.slots = torch.randperm(2 * rows)[:rows].int()
        self._kind = quantization, dtype

    def weight(self, outputs: int) -> tuple[Any, torch.Tensor]:
        """A random one as the kernel reads it, and its exact numbers."""
        weight = torch.randn(outputs, DIM)
        return definitions.tiled(weight, *self._kind), definitions.exact(weight, *self._kind)

    def rows(self, rows: slice) -> Any:
        """Some rows of the stream for the norm."""
        own = self.stream[rows].clone()
        squares = norm_kernel.add(own, None)
        return products.Normed(own, squares, self.norm_weight, definitions.EPS)

    def heads(self, rows: slice, cache: tuple[torch.Tensor, torch.Tensor]) -> Any:
        angles = torch.view_as_real(self.rotation[rows].clone())
        return products.Heads(angles, *cache, self.slots[rows].clone())


def new_cache(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.zeros(2 * rows, 1, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    return keys, values


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
def test_products_and_what_surrounds_them_equal_their_definitions(
    quantization: str, dtype: torch.dtype, rows: int
) -> None:
    layer = Layer(quantization, dtype, rows)
    every = slice(None)
    weight, exact = layer.weight(40)
    assert_near(products.multiply(layer.stream, weight), layer.stream.float() @ exact.t())
    weight, exact = layer.weight(96)
    gate, up = (layer.normed @ exact.t()).chunk(2, dim=1)
    assert_near(products.multiply_gated(layer.rows(every), weight), F.silu(gate) * up)
    weight, exact = layer.weight(DIM)
    stream = layer.stream.clone()
    squares = products.add_product(layer.stream, weight, stream)
    assert_near(stream, layer.stream.float() + layer.stream.float() @ exact.t())
    torch.testing.assert_close(squares.sum(dim=1), stream.float().square().sum(dim=1))


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
def test_heads_are_rotated_and_keys_and_values_written_where_they_belong(
    kv_dtype: torch.dtype,
) -> None:
    rows = 19
    dtype = torch.float32 if kv_dtype == torch.float32 else HALF
    layer = Layer("none", dtype, rows)
    weight, exact = layer.weight((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    keys, values = new_cache(rows, kv_dtype)
    query = products.write_heads(
        layer.rows(slice(None)), weight, layer.heads(slice(None), (keys, values))
    )
    heads = (layer.normed @ exact.t()).view(rows, -1, HEAD_DIM)
    turned = definitions.rotated(heads[:, :-KV_HEADS], layer.rotation)
    assert_near(query, turned[:, :HEADS].flatten(1))
    for cache, written in ((keys, turned[:, HEADS:]), (values, heads[:, -KV_HEADS:])):
        held = cache.flatten(0, 1).float()[layer.slots.long()]
        if kv_dtype.itemsize == 1:
            torch.testing.assert_close(held, written, rtol=2**-3, atol=2**-8)
        else:
            assert_near(held.to(dtype), written)
        others = torch.ones(len(cache), dtype=torch.bool)
        others[layer.slots.long()] = False
        assert not cache.float()[others].any()


@settings(max_examples=8)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(2, 36),
    begin=st.integers(0, 35),
    count=st.integers(1, 18),
    seed=st.integers(0, 1000),
)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    kind: tuple[str, torch.dtype], rows: int, begin: int, count: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = Layer(*kind, rows)
    chosen = slice(min(begin, rows - 1), min(begin, rows - 1) + count)
    joined, down, gated = (
        layer.weight(outputs)[0] for outputs in ((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM, 64)
    )
    found = []
    for part in (slice(None), chosen):
        cache = new_cache(rows, kind[1])
        stream = layer.stream[part].clone()
        squares = products.add_product(layer.stream[part].clone(), down, stream)
        after = products.Normed(stream, squares, layer.norm_weight, definitions.EPS)
        query = products.write_heads(layer.rows(part), joined, layer.heads(part, cache))
        written = [each.flatten(0, 1)[layer.slots[chosen].long()] for each in cache]
        outputs = [stream, squares, query, products.multiply_gated(after, gated)]
        outputs.append(norm_kernel.norm(stream, layer.norm_weight, definitions.EPS))
        own = outputs if part is chosen else [each[chosen] for each in outputs]
        found.append([*own, *written])
    for whole, alone in zip(*found, strict=True):
        assert torch.equal(whole, alone)


CONTEXTS = (300, 140, 9)


class Contexts:
    """Sequences whose keys and values lie in a cache; what nothing has written is NaN."""

    def __init__(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        shape = CacheShape(1, 120, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.spans = spread(CONTEXTS, CONTEXTS, shape, seed=1)
        size = shape.blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM
        keys, values = (torch.full(size, torch.nan) for _ in range(2))
        for span in self.spans:
            for position in range(span.context_length):
                block = span.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE
                keys[block], values[block] = torch.randn(2, KV_HEADS, HEAD_DIM)
        self.cache = keys.to(kv_dtype), values.to(kv_dtype)
        self.queries = [torch.randn(each, HEADS, HEAD_DIM).to(dtype) for each in CONTEXTS]

    def attend(self, parts: list[tuple[int, int, int]], *, apart: bool = True) -> torch.Tensor:
        """Attention of parts of sequences: which one, and the first and last of its tokens."""
        spans = [
            SequenceSpan(end - begin, end, self.spans[which].block_table)
            for which, begin, end in parts
        ]
        tables = page_tables(spans, BLOCK_SIZE)
        tiles = query_tiles(tables, attention.tokens_per_tile(HEADS, KV_HEADS))
        decodes = len(spans) if apart and all(span.query_length == 1 for span in spans) else 0
        longest = max(span.context_length for span in spans)
        step = attention.AttentionStep(
            torch.from_numpy(tables.slots),
            torch.from_numpy(tiles),
            torch.from_numpy(tables.pages),
            decodes,
            -(-longest // attention.SPLIT),
        )
        query = torch.cat([self.queries[which][begin:end] for which, begin, end in parts])
        attended: torch.Tensor = attention.attend(query.flatten(1), self.cache, step)
        return attended.view(query.shape)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(HALF, HALF), (HALF, torch.float8_e4m3fn), (torch.float32, torch.float32)],
)
def test_attention_equals_its_definition(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    contexts = Contexts(dtype, kv_dtype)
    parts = [(0, 290, 300), (1, 139, 140), (2, 0, 9)]
    spans = [
        SequenceSpan(end - begin, end, contexts.spans[i].block_table) for i, begin, end in parts
    ]
    query = torch.cat([contexts.queries[i][begin:end] for i, begin, end in parts])
    assert_near(contexts.attend(parts), definitions.attention(query, contexts.cache, spans))


@settings(max_examples=6)
@given(
    dtype=st.sampled_from([HALF, torch.float32]),
    ends=st.tuples(*(st.integers(1, length) for length in CONTEXTS)),
    before=st.tuples(*(st.integers(0, 7) for _ in CONTEXTS)),
)
def test_a_tokens_attention_is_the_same_decoded_and_in_any_chunk(
    dtype: torch.dtype, ends: tuple[int, ...], before: tuple[int, ...]
) -> None:
    contexts = Contexts(dtype, dtype)
    chunks = [(i, max(0, end - 1 - before[i]), end) for i, end in enumerate(ends)]
    in_chunks = contexts.attend(chunks)
    lengths = torch.tensor([end - begin for _, begin, end in chunks])
    last = in_chunks[lengths.cumsum(0) - 1]
    ones = [(i, end - 1, end) for i, end in enumerate(ends)]
    assert torch.equal(contexts.attend(ones), last)
    assert torch.equal(contexts.attend(ones, apart=False), last)
    assert torch.equal(contexts.attend(ones[:1]), last[:1])
