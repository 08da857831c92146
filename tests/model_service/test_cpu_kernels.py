"""The compiled CPU kernels: the formulas in float64, and the same bits for every number of rows."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model_service.loading.precision import Determinism, choose_precision
from model_service.model.attention.backend import CacheShape, SequenceSpan
from model_service.model.attention.fixed_tiles import FixedTileAttention
from model_service.model.attention.sdpa import SdpaAttention
from model_service.model.attention.select import make_attention
from model_service.model.cpu import kernels, library
from model_service.model.operations import PlainOperations, RowOperations, rotary_frequencies
from model_service.model.weights.packing import packing
from tests.model_service.conftest import CPU, spread

ROUNDING = 2**-8  # of bfloat16, relative
pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def compiled() -> kernels.Kernels:
    return kernels.load() or pytest.skip(kernels.without_kernels())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
@pytest.mark.parametrize("rows", [1, 7])
def test_operations_round_once(compiled: kernels.Kernels, head_dim: int, rows: int) -> None:
    rotary = rotary_frequencies(head_dim, 100)
    own, plain = RowOperations(compiled, rotary), PlainOperations(rotary)
    x, residual, weight = (
        numbers(rows, 6 * head_dim),
        numbers(rows, 6 * head_dim),
        numbers(6 * head_dim),
    )
    total = residual + x
    normed, summed = own.add_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, total)
    exact = F.rms_norm(total.double(), weight.shape, weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), exact, atol=1e-6, rtol=ROUNDING)
    assert torch.equal(own.norm(total, weight, 1e-5), normed)
    angles = own.rotation(torch.arange(rows))
    heads = x.view(rows, 6, head_dim)
    rotated = plain.rotate(heads.float(), 4, angles)
    joined = F.pad(heads, (0, 0, 0, 2))  # followed by heads that are not rotated
    own.rotate(joined[:, :6], 4, angles)
    torch.testing.assert_close(joined[:, :6].float(), rotated, atol=1e-6, rtol=ROUNDING)
    assert not joined[:, 6:].any()
    wide = x * 30
    exact = plain.gate(wide.double())
    torch.testing.assert_close(own.gate(wide).double(), exact, atol=1e-6, rtol=2 * ROUNDING)


def test_a_nan_stays_in_its_row(compiled: kernels.Kernels) -> None:
    x = numbers(3, 64)
    x[1, 5] = torch.nan
    operations = RowOperations(compiled, rotary_frequencies(8, 8))
    for result in (
        operations.norm(x, numbers(64), 1e-5),
        operations.gate(x),
    ):
        assert result.isnan().any(dim=1).tolist() == [False, True, False]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over one sequence [length, heads, head_dim] in float64."""
    sharing = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(sharing, dim=1) for x in (key, value))
    q, k, v = (x.transpose(0, 1) for x in (query.double(), key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    chunk=st.integers(1, 200),
    block_sizes=st.tuples(st.sampled_from([1, 5, 16, 48, 128]), st.sampled_from([3, 16, 64])),
    head_dim=st.sampled_from([8, 64, 80, 128]),
    eight_bits=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_is_exact_and_the_same_in_all_chunks_and_blocks(
    compiled: kernels.Kernels,
    lengths: list[int],
    chunk: int,
    block_sizes: tuple[int, int],
    head_dim: int,
    eight_bits: bool,
    seed: int,
) -> None:
    kv_dtype = torch.float8_e4m3fn if eight_bits else torch.bfloat16
    parts = [
        [numbers(length, heads, head_dim, seed=seed + i) for i, length in enumerate(lengths)]
        for heads in (6, 2, 2)
    ]

    def shape(block_size: int) -> CacheShape:
        blocks = 1 + sum(-(-length // block_size) for length in lengths)
        return CacheShape(1, blocks, block_size, 2, head_dim)

    together = FixedTileAttention(compiled, shape(block_sizes[0]), kv_dtype)
    together.plan(spread(lengths, lengths, shape(block_sizes[0]), seed))
    attended = together.attend(0, *(torch.cat(each) for each in parts))
    whole = torch.split(attended, lengths)
    for sequence, expected in zip(zip(*parts, strict=True), whole, strict=True):
        query, key, value = sequence
        if not eight_bits:
            exact = dense(query, key, value)
            torch.testing.assert_close(expected.double(), exact, atol=1e-5, rtol=ROUNDING)
        cache = shape(block_sizes[1])
        alone = FixedTileAttention(compiled, cache, kv_dtype)
        [table] = [span.block_table for span in spread([len(query)], [1], cache, seed)]
        outputs = []
        for begin in range(0, len(query), chunk):
            end = min(begin + chunk, len(query))
            alone.plan([SequenceSpan(end - begin, end, table)])
            outputs.append(alone.attend(0, *(each[begin:end] for each in (query, key, value))))
        assert torch.equal(torch.cat(outputs), expected)


def test_without_the_compiled_kernels_those_of_pytorch_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "_MODULE", "model_service.model.cpu._not_compiled")
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


def test_a_library_of_another_version_is_not_used(
    compiled: kernels.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_INTERFACE", 0)
    monkeypatch.setattr(kernels, "find_library", library.find_library.__wrapped__)
    assert kernels.load() is None
    assert "is of another version: install this package again" in kernels.without_kernels()
