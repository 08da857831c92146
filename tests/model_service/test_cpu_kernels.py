"""The compiled CPU kernels: the formulas in float64, and the same bits for every number of rows."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model_service.loading.precision import Determinism, choose_precision
from model_service.model.attention.backend import CacheShape, SequenceSpan, narrowed
from model_service.model.attention.fixed_tiles import FixedTileAttention
from model_service.model.attention.sdpa import SdpaAttention
from model_service.model.attention.select import make_attention
from model_service.model.cpu import kernels, library
from model_service.model.operations import PlainOperations, RowOperations, rotary_frequencies
from model_service.model.weights.packing import packing
from tests.model_service.conftest import CPU, spread

pytestmark = pytest.mark.kernels

# The largest step between neighbouring numbers, relative.
ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-23}


def kernels_of(dtype: torch.dtype) -> kernels.Kernels:
    return kernels.kernels_for(dtype, CPU) or pytest.skip(kernels.without_kernels())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
@pytest.mark.parametrize("rows", [1, 7])
def test_operations_round_no_oftener_than_pytorch(
    dtype: torch.dtype, head_dim: int, rows: int
) -> None:
    rotary, rounding = rotary_frequencies(head_dim, 100), ROUNDING[dtype]
    own, plain = RowOperations(kernels_of(dtype), rotary), PlainOperations(rotary)
    x, residual, weight = (
        numbers(*size, 6 * head_dim, seed=seed, dtype=dtype)
        for seed, size in enumerate([[rows], [rows], []])
    )
    total = residual + x
    normed, summed = own.add_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, total)
    exact = F.rms_norm(total.double(), weight.shape, weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), exact, atol=1e-9, rtol=2 * rounding)
    assert torch.equal(own.norm(total, weight, 1e-5), normed)
    angles = own.rotation(torch.arange(rows))
    heads = x.view(rows, 6, head_dim)
    turned = torch.view_as_complex(heads.double().reshape(rows, 6, -1, 2)) * angles.unsqueeze(1)
    joined = F.pad(heads, (0, 0, 0, 2))  # followed by heads that are not rotated
    own.rotate(joined[:, :6], 4, angles)
    error = torch.view_as_complex(joined[:, :6].double().reshape(rows, 6, -1, 2)) - turned
    assert (error.abs() <= turned.abs() * rounding).all()
    assert not joined[:, 6:].any()
    wide = x * 30
    exact = plain.gate(wide.double())
    torch.testing.assert_close(own.gate(wide).double(), exact, atol=1e-30, rtol=4 * rounding)


def test_a_nan_stays_in_its_row() -> None:
    x = numbers(3, 64)
    x[1, 5] = torch.nan
    for dtype in ROUNDING:
        operations = RowOperations(kernels_of(dtype), rotary_frequencies(8, 8))
        wide = x.to(dtype)
        for result in (operations.norm(wide, wide[0], 1e-5), operations.gate(wide)):
            assert result.isnan().any(dim=1).tolist() == [False, True, False]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over one sequence [length, heads, head_dim] in float64."""
    sharing = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(sharing, dim=1) for x in (key, value))
    q, k, v = (x.transpose(0, 1) for x in (query.double(), key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@pytest.mark.parametrize("dtype", ROUNDING)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    chunk=st.integers(1, 200),
    block_sizes=st.tuples(st.sampled_from([1, 5, 16, 48, 128]), st.sampled_from([3, 16, 64])),
    head_dim=st.sampled_from([8, 64, 80, 128]),
    kv_heads=st.sampled_from([1, 2, 6]),
    eight_bits=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_attention_is_exact_and_the_same_in_all_chunks_and_blocks(
    dtype: torch.dtype,
    lengths: list[int],
    chunk: int,
    block_sizes: tuple[int, int],
    head_dim: int,
    kv_heads: int,
    eight_bits: bool,
    threads: int,
    seed: int,
) -> None:
    kv_dtype = torch.float8_e4m3fn if eight_bits else dtype
    parts = [
        [
            numbers(length, heads, head_dim, seed=kind + 3 * i, dtype=dtype)
            for i, length in enumerate(lengths)
        ]
        for kind, heads in enumerate((6, kv_heads, kv_heads))
    ]

    def attention(block_size: int) -> tuple[FixedTileAttention, CacheShape]:
        blocks = 1 + sum(-(-length // block_size) for length in lengths)
        shape = CacheShape(1, blocks, block_size, kv_heads, head_dim)
        backend = FixedTileAttention(kernels_of(dtype), shape, kv_dtype)
        for cache in (backend._keys, backend._values):
            cache.fill_(0xFF if eight_bits else torch.nan)  # as unwritten memory may be
        return backend, shape

    together, shape = attention(block_sizes[0])
    together.plan(spread(lengths, lengths, shape, seed))
    attended = together.attend(0, *(torch.cat(each) for each in parts))
    torch.set_num_threads(threads)
    for sequence, expected in zip(
        zip(*parts, strict=True), torch.split(attended, lengths), strict=True
    ):
        query, key, value = sequence
        key, value = (narrowed(each, kv_dtype).to(dtype) for each in (key, value))
        error = (expected.double() - dense(query, key, value)).abs()
        # Scores and weights are rounded, too: the error is relative to the terms' sizes.
        tolerance = {torch.bfloat16: 2**-6, torch.float32: 2**-19}[dtype]
        assert (error <= tolerance * dense(query, key, value.abs())).all()
        alone, shape = attention(block_sizes[1])
        [table] = [span.block_table for span in spread([len(query)], [1], shape, seed)]
        outputs = []
        for begin in range(0, len(query), chunk):
            end = min(begin + chunk, len(query))
            alone.plan([SequenceSpan(end - begin, end, table)])
            outputs.append(alone.attend(0, *(each[begin:end] for each in sequence)))
        assert torch.equal(torch.cat(outputs), expected)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_number_of_eight_bits_is_kept(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    values = codes.nan_to_num().view(4, 1, 64)  # one token for each sequence
    shape = CacheShape(1, 5, 16, 1, 64)
    backend = FixedTileAttention(kernels_of(dtype), shape, torch.float8_e4m3fn)
    backend.plan([SequenceSpan(1, 1, [block]) for block in range(1, 5)])
    for wide in (values, values * 1.03, values * 0.97, values * 1e3):
        found = backend.attend(0, torch.zeros_like(values), values, wide)
        assert torch.equal(found, narrowed(wide, torch.float8_e4m3fn).to(dtype))


def test_without_the_compiled_kernels_those_of_pytorch_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "MODULE", "model_service.model.cpu._not_compiled")
    monkeypatch.setattr(kernels, "find_library", library.find_library.__wrapped__)
    assert "install a C++ compiler" in kernels.without_kernels()
    precision = choose_precision(CPU, "bfloat16", "none", "auto", small=False)
    assert precision.determinism is Determinism.SEEDED
    cache = CacheShape(1, 4, 16, 2, 8)
    arguments = (cache, torch.bfloat16, CPU, torch.bfloat16)
    assert isinstance(make_attention(*arguments, heads=2, max_batch_size=1), SdpaAttention)
    x, weight = numbers(2, 64), numbers(64, 64)
    packed = packing("none", torch.bfloat16, CPU)(weight)
    product = F.linear(x, packed).double()  # type: ignore[arg-type]
    torch.testing.assert_close(product, x.double() @ weight.double().T, atol=1e-2, rtol=1e-2)


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_of(torch.bfloat16)
    monkeypatch.setattr(library, "INTERFACE", 0)
    monkeypatch.setattr(kernels, "find_library", library.find_library.__wrapped__)
    assert kernels.kernels_for(torch.bfloat16, CPU) is None
    assert "is of another version: install this package again" in kernels.without_kernels()
