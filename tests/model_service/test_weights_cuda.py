"""The CUDA formats where no CUDA is: layouts, precision, and what PyTorch's fake tensors check.

The results of their kernels on a GPU are not tested here.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from model_service.model.config import Quantization
from model_service.model.weights import cuda as weights_cuda
from model_service.model.weights import matrices as weights
from model_service.model.weights.quantization import GROUP_SIZE, Int4Weight


def random_weight(outputs: int, inputs: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)


def tinygemm_tiles(codes: torch.Tensor, inner: int) -> torch.Tensor:
    """The output of `_convert_weight_to_int4pack` for codes [outputs, inputs] on CUDA.

    Written after `matrix_to_m16n8k16_Bint4_layout` in aten/src/ATen/native/cuda/int4mm.cu: one
    lane's eight codes after the other.
    """
    outputs, inputs = codes.shape
    tiles = torch.empty(outputs // 8, inputs // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for octet, block, lane, pair in itertools.product(*map(range, tiles.shape)):
        row = codes[8 * octet + lane // 4].tolist()
        first = 16 * inner * block + 32 * pair + 2 * (lane % 4)
        even, odd = (row[first + parity : first + 32 : 8] for parity in (0, 1))
        tiles[octet, block, lane, pair] = sum(c << 4 * i for i, c in enumerate(even + odd))
    return torch.where(tiles < 2**31, tiles, tiles - 2**32).int()


@given(octets=st.integers(1, 2), groups=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_codes_are_found_in_the_kernels_layout(octets: int, groups: int, seed: int) -> None:
    quantized = Int4Weight.quantize(random_weight(8 * octets, GROUP_SIZE * groups, seed))
    codes = quantized.unpacked_codes()
    tiles = tinygemm_tiles(codes, weights_cuda.tinygemm_inner_tiles(codes.shape[1]))
    assert torch.equal(weights_cuda.tinygemm_codes(tiles), codes)


@pytest.mark.parametrize(
    ("inputs", "tiles"), [(4096, 8), (11008, 8), (13824, 8), (64, 4), (96, 2), (1376, 2)]
)
def test_as_many_tiles_lie_together_as_divide_a_row(inputs: int, tiles: int) -> None:
    assert weights_cuda.tinygemm_inner_tiles(inputs) == tiles


def test_dequantized_tiles_multiply_as_pytorchs_own_kernel() -> None:
    quantized = Int4Weight.quantize(random_weight(64, 256))
    codes, scales = quantized.unpacked_codes(), weights_cuda.tinygemm_scales(quantized)
    dequantized = weights_cuda.dequantize_tinygemm(tinygemm_tiles(codes, 8), scales)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = torch._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales)
    error = (F.linear(x, dequantized) - expected).float().norm() / expected.float().norm()
    assert error < 0.005


def test_dequantized_tiles_are_the_weights_in_bfloat16() -> None:
    quantized = Int4Weight.quantize(random_weight(16, 512))
    tiles = tinygemm_tiles(quantized.unpacked_codes(), 8)
    weight = weights_cuda.dequantize_tinygemm(tiles, weights_cuda.tinygemm_scales(quantized))
    exact = quantized.dequantize()
    # Scale and zero are rounded to 8 bits each, the sum once more.
    assert (weight.float() - exact).abs().max() <= 3 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_int8_multiplies_as_the_plain_weight(dtype: torch.dtype, rows: int) -> None:
    weight = random_weight(64, 512)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    product = F.linear(x, weights_cuda.pack_int8(weight, dtype))  # type: ignore[arg-type]
    exact = F.linear(x.float(), weight)
    assert product.dtype == dtype
    assert product.shape == exact.shape
    assert (product.float() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("name", weights_cuda.PACK)
@pytest.mark.parametrize("rows", [0, 1, 17, 65, 300])
def test_any_number_of_rows_gives_a_product_of_its_shape(
    name: Quantization, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_cuda, "_HAS_TRITON", False)  # it does not know fake tensors
    # Parts of a fake CUDA tensor can only be taken where PyTorch is built for CUDA.
    device = "cpu" if name == "int4" else "cuda"
    with FakeTensorMode():
        packed = weights_cuda.PACK[name](torch.empty(96, 256, device=device), torch.bfloat16)
        x = torch.empty(rows, 256, dtype=torch.bfloat16, device=device)
        product = F.linear(x, packed)  # type: ignore[arg-type]
    assert product.shape == (rows, 96)
    assert (product.dtype, product.device.type) == (torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_product_is_that_of_its_definition(dtype: torch.dtype) -> None:
    weight = random_weight(64, 512)
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    # On the CPU `_scaled_mm` takes the same arguments as on CUDA.
    product = F.linear(x, weights_cuda.pack_fp8(weight, dtype))  # type: ignore[arg-type]
    exact = F.linear(x.float(), weights.pack_fp8()(weight))  # type: ignore[arg-type]
    assert product.dtype == dtype
    assert (product.float() - exact).norm() <= 0.004 * exact.norm()
    assert (product.float() - F.linear(x.float(), weight)).norm() <= 0.05 * exact.norm()


def test_int4_refuses_activations_that_its_kernel_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"bfloat16, not torch\.float16"):
        weights_cuda.pack_int4(random_weight(8, 32), torch.float16)
