"""The Triton kernels where no GPU is. In Triton's interpreter: what they read and where they write
it. Compiled: whether they fit into a card. How a GPU rounds, it alone shows (test_cuda_weights.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.model.attention import rotation
from model_service.model.operations import rotary_frequencies
from model_service.model.weights import cuda as weights_cuda
from model_service.model.weights.quantization import GROUP_SIZE, Fp8Weight, Int8Weight, fp8_rows

triton: Any = pytest.importorskip("triton", reason="Triton is not installed")
kernels: Any = pytest.importorskip("model_service.model.cuda.weight_kernels")
rotation_kernel: Any = pytest.importorskip("model_service.model.cuda.rotation_kernel")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="kernels run on the GPU here, or the interpreter is older than NumPy's newest",
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@interpreted
@settings(max_examples=20)
@given(
    quantize=st.sampled_from([Int8Weight.quantize, Fp8Weight.quantize]),
    rows=st.sampled_from([1, 15, 16, 17, 33, 65]),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 12).map(lambda least: 32 * least),
)
def test_products_are_those_of_the_dequantized_weight(
    quantize: Any, rows: int, outputs: int, inputs: int
) -> None:
    weight = quantize(torch.randn(outputs, inputs))
    x = torch.randn(rows, inputs).half()  # the interpreter multiplies no bfloat16
    exact = x.float() @ (weight.codes.float() * weight.scales.view(-1, 1)).t()
    product = kernels.multiply(x, weight.codes, weight.scales)
    assert product.dtype == x.dtype
    assert (product - exact).abs().max() <= 0.001 * exact.abs().max()


@interpreted
@pytest.mark.parametrize("outputs", [40, 32 * 270])
def test_products_are_the_same_from_tiles_of_either_width(outputs: int) -> None:
    weight = Int8Weight.quantize(torch.randn(outputs, 64))
    x = torch.randn(3, 64).half()
    exact = x.float() @ (weight.codes.float() * weight.scales.view(-1, 1)).t()
    product = kernels.multiply(x, weight.codes, weight.scales)
    assert (product - exact).abs().max() <= 0.001 * exact.abs().max()


@interpreted
@given(octets=st.integers(1, 3), groups=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_four_bit_codes_are_taken_from_their_places(octets: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = GROUP_SIZE * groups, 8 * octets
    inner = weights_cuda.tinygemm_inner_tiles(inputs)
    shape = octets, inputs // (16 * inner), 32, inner // 2
    tiles = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    scales = torch.randn(groups, outputs, 2, generator=generator).bfloat16()
    plain = weights_cuda.dequantize_tinygemm(tiles, scales)
    unpacked = kernels.unpack_int4(tiles, scales)
    torch.testing.assert_close(unpacked, plain, rtol=2**-7, atol=0)  # it cuts, and does not round


@interpreted
@pytest.mark.parametrize("columns", [7, 2048, 5000])
def test_rows_become_the_codes_of_the_definition(columns: int) -> None:
    x = torch.randn(6, columns).bfloat16()
    x[1], x[2, 5], x[3, columns - 1] = 0.0, torch.nan, torch.inf
    codes, scales = kernels.fp8_rows(x)
    expected, expected_scales = fp8_rows(x)
    torch.testing.assert_close(scales, expected_scales, equal_nan=True)
    values, exact = (each.float()[[0, 1, 4, 5]] for each in (codes, expected))
    close = torch.isclose(values, exact, rtol=0.13, atol=2**-9)
    # The interpreter loses the carry where a code is rounded up to a power of two.
    assert torch.equal(2 * values[~close], exact[~close])


# Bytes of shared memory that a program may have on cards of these compute capabilities.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
REGISTERS = 65536  # of a processor


def test_kernels_compile_for_cards_that_are_not_here(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script)]
    made = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    compiled = json.loads(made)
    for name, kinds in compiled.items():
        for kind in kinds:
            assert kind["spilled"] == 0, (name, kind)
            assert kind["shared"] <= SHARED[kind["capability"]], (name, kind)
    for kind in compiled["_multiply"]:
        assert kind["matrix_units"], kind
        assert kind["copies_ahead"], kind
        # Two programs at a time on a processor: one computes while the other waits.
        assert 2 * kind["registers"] <= REGISTERS
        assert 2 * kind["shared"] <= SHARED[kind["capability"]]


def new_cache(dtype: torch.dtype, *size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `size`, slots first, in blocks of one slot."""
    keys, values = (torch.zeros(size).unsqueeze(1).to(dtype) for _ in range(2))
    return keys, values


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16}[x.dtype.itemsize])


@interpreted
@settings(max_examples=12)
@given(
    kv_heads=st.integers(1, 9),
    shared=st.integers(1, 4),
    tokens=st.integers(1, 4),
    head_dim=st.sampled_from([64, 128, 256]),
    kv_dtype=st.sampled_from([torch.float16, torch.float8_e4m3fn]),
    rotates=st.booleans(),
    apart=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_heads_are_rotated_narrowed_and_written_as_the_definition_does(
    kv_heads: int,
    shared: int,
    tokens: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    rotates: bool,
    apart: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = kv_heads * shared
    size = tokens, queries + 2 * kv_heads, head_dim
    heads = (8 * torch.randn(size, generator=generator)).half()
    slots = torch.randperm(9, generator=generator)[:tokens].int()
    angles = rotary_frequencies(head_dim, 40)[torch.randint(40, (tokens,), generator=generator)]
    found = []
    for write in (rotation.rotate_and_write, rotation_kernel.rotate_and_write):
        own = heads.clone()
        parts = rotation.Heads(*torch.split(own, [queries, kv_heads, kv_heads], dim=1))
        cache = new_cache(kv_dtype, 9, kv_heads, head_dim)
        rotated = torch.zeros(tokens, queries, head_dim).half() if apart else parts.query
        # Queries that are rotated already are the caller's to copy.
        write(parts, angles if rotates else None, cache, slots, rotated if rotates else parts.query)
        found.append((own, rotated, *cache))
    for defined, computed in zip(*found, strict=True):
        if rotates:  # a sum of two products is rounded once or twice
            step = 2**-3 if defined.dtype.itemsize == 1 else 2**-10
            torch.testing.assert_close(computed.float(), defined.float(), rtol=step, atol=step / 32)
        else:
            assert torch.equal(bits(computed), bits(defined))


@interpreted
def test_every_half_precision_number_is_narrowed_as_pytorch_narrows_it() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    heads = every.view(1, 256, 256)  # 85 heads of each kind, and one more query
    parts = rotation.Heads(heads[:, :86], heads[:, 86:171], heads[:, 171:])
    slots = torch.zeros(1, dtype=torch.int32)
    found = []
    for write in (rotation.rotate_and_write, rotation_kernel.rotate_and_write):
        cache = new_cache(torch.float8_e4m3fn, 1, 85, 256)
        write(parts, None, cache, slots, parts.query)
        found.append(torch.cat([bits(each) for each in cache]))
    # A NaN is 0x7f with either sign.
    assert torch.equal(*(torch.where(each & 0x7F == 0x7F, 0x7F, each) for each in found))
