"""The compiled products in every form of weights: their definitions in float64, and the same bits
for every number of rows and threads.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model_service.model.cpu import kernels
from model_service.model.cpu.products import Form, Products
from model_service.model.weight_sizes import weight_bytes
from model_service.model.weights.packing import packing
from model_service.model.weights.quantization import GROUP_SIZE, Int4Weight, Int8Weight
from tests.model_service.conftest import CPU

ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-21}  # relative, with a few steps before
# Each form with the types of its activations.
SERVED = [
    (Form.BFLOAT16, torch.bfloat16),
    (Form.FLOAT32, torch.float32),
    *((form, dtype) for form in (Form.INT8, Form.INT4) for dtype in ROUNDING),
]
pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def products() -> Products:
    found = kernels.kernels_for(torch.float32, CPU) or pytest.skip(kernels.without_kernels())
    return found.products


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different size, as outliers make them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=generator).exp()
    return (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)


def in_eight_bits(x: torch.Tensor, group: int) -> torch.Tensor:
    """X in float64 as 8-bit codes with one scale for each `group` of a row."""
    groups = x.float().view(len(x), -1, group)
    peaks = groups.abs().amax(dim=2, keepdim=True)
    largest = torch.tensor(127.0)  # a number would be multiplied by a rounded reciprocal
    codes = (groups.double() * (largest / peaks).double()).round()
    return (codes * (peaks / largest).double()).flatten(1)


def exact_product(form: Form, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in float64 of what the form makes of the two."""
    if form == Form.INT8:
        x, weight = (
            in_eight_bits(x, x.shape[1]),
            Int8Weight.quantize(weight).narrow(0, 0, len(weight)),
        )
    if form == Form.INT4:
        x, weight = in_eight_bits(x, GROUP_SIZE), Int4Weight.quantize(weight).dequantize()
    return x.double() @ weight.double().T


@settings(max_examples=100)
@given(
    served=st.sampled_from(SERVED),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 300),
    rows=st.integers(1, 80),
    part=st.tuples(st.integers(0, 80), st.integers(1, 80)),
    threads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_a_product_is_exact_and_the_same_for_some_of_its_rows(
    products: Products,
    served: tuple[Form, torch.dtype],
    outputs: int,
    inputs: int,
    rows: int,
    part: tuple[int, int],
    threads: tuple[int, int],
) -> None:
    form, dtype = served
    inputs = inputs if form != Form.INT4 else -(-inputs // GROUP_SIZE) * GROUP_SIZE
    weight, x = numbers(outputs, inputs, dtype, seed=1), numbers(rows, inputs, dtype, seed=2)
    packed = products.pack(weight, form)
    torch.set_num_threads(threads[0])
    product = products.multiply(x, packed)
    assert product.dtype == dtype
    exact = exact_product(form, x, weight)
    sizes = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert ((product - exact).abs() <= exact.abs() * ROUNDING[dtype] + sizes * 2e-6).all()
    some = slice(part[0], part[0] + part[1])
    torch.set_num_threads(threads[1])
    assert torch.equal(products.multiply(x[some], packed), product[some])


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_float32_is_summed_as_exactly_as_a_library_does(products: Products, rows: int) -> None:
    weight, x = (torch.rand(size, 8192) for size in (64, rows))  # all of one sign
    exact = x.double() @ weight.double().T
    error = products.multiply(x, products.pack(weight, Form.FLOAT32)) - exact
    assert (error.abs() <= exact * 2e-6).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("form", [Form.INT8, Form.INT4])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_largest_codes_do_not_overflow(
    products: Products, form: Form, rows: int, sign: float
) -> None:
    weight, x = torch.ones(20, 16384), torch.full((rows, 16384), sign)
    weight[:, ::GROUP_SIZE] = 0.0  # so that the other codes of int4 are the largest
    product = products.multiply(x, products.pack(weight, form))
    torch.testing.assert_close(product, F.linear(x, weight), rtol=0.005, atol=0.0)


@pytest.mark.parametrize(("form", "dtype"), SERVED)
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(
    products: Products, form: Form, dtype: torch.dtype, spoiled: float
) -> None:
    packed = products.pack(numbers(40, 128, dtype, seed=1), form)
    x = numbers(20, 128, dtype, seed=2)
    x[3] = 0.0
    expected = products.multiply(x, packed)
    assert (expected[3] == 0.0).all()
    x[7, 5] = spoiled
    product = products.multiply(x, packed)
    assert not product[7].isfinite().any()
    expected[7] = product[7] = 0.0
    assert torch.equal(product, expected)


@pytest.mark.parametrize("form", [Form.INT8, Form.INT4])
def test_rows_may_be_very_large_or_small(products: Products, form: Form) -> None:
    packed = products.pack(numbers(40, 128, torch.float32, seed=1), form)
    x = numbers(1, 128, torch.float32, seed=2)
    expected = products.multiply(x, packed)
    for size in (2.0**100, 2.0**-100):
        torch.testing.assert_close(products.multiply(x * size, packed) / size, expected)
    assert (products.multiply(x * 2.0**-140, packed) == 0.0).all()


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Weights of all sizes; some rows are constant, and some values lie between two codes."""
    shape = draw(st.integers(1, 40)), GROUP_SIZE * draw(st.integers(1, 6))
    weight = numbers(*shape, draw(st.sampled_from([*ROUNDING])), draw(st.integers(0, 2**32)))
    row = draw(st.integers(0, shape[0] - 1))
    weight[row] = draw(st.sampled_from([0.0, 0.3, -1e-30]))
    if draw(st.booleans()):
        weight[row] = torch.arange(shape[1]) / 2 - draw(st.sampled_from([0.0, 63.5, 200.0]))
    return weight


@given(weight=weights())
def test_int8_weights_have_the_codes_of_the_format(
    products: Products, weight: torch.Tensor
) -> None:
    outputs, inputs = weight.shape
    expected = Int8Weight.quantize(weight)
    packed = products.pack(weight, Form.INT8)
    lines = packed.memory.view(-(-outputs // 16), -1, 64)
    quadruples = lines[:, :-1].view(torch.int8).reshape(len(lines), -1, 16, 4)
    codes = quadruples.transpose(1, 2).flatten(2).flatten(0, 1)
    assert torch.equal(codes[:outputs, :inputs], expected.codes)
    assert not codes[outputs:].any()
    assert not codes[:, inputs:].any()
    assert torch.equal(lines[:, -1].view(torch.float32).flatten()[:outputs], expected.scales)


@given(weight=weights())
def test_int4_weights_have_the_codes_of_the_format(
    products: Products, weight: torch.Tensor
) -> None:
    outputs, inputs = weight.shape
    expected = Int4Weight.quantize(weight)
    packed = products.pack(weight, Form.INT4)
    groups = packed.memory.view(-(-outputs // 16), inputs // GROUP_SIZE, 9, 64)
    lines = groups[:, :, :8].reshape(*groups.shape[:2], 8, 16, 4)
    pairs = lines.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
    codes = torch.cat((pairs & 15, pairs >> 4), dim=2).flatten(1)
    assert torch.equal(codes[:outputs], expected.unpacked_codes())
    halves = groups[:, :, 8].view(torch.bfloat16).float().reshape(*groups.shape[:2], 2, 16)
    scales, minima = halves.permute(2, 0, 3, 1).flatten(1, 2)[:, :outputs]
    assert torch.equal(scales, expected.scales)
    assert torch.equal(minima, expected.minima)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_packing_chooses_these_products(products: Products, quantization: Any) -> None:
    weight, x = numbers(48, 64, torch.float32, seed=1), numbers(9, 64, torch.float32, seed=2)
    packed = packing(quantization, torch.float32, CPU)(weight)
    product = F.linear(x, packed)  # type: ignore[arg-type]
    for row in range(len(x)):
        assert torch.equal(F.linear(x[row : row + 1], packed)[0], product[row])  # type: ignore[arg-type]


@pytest.mark.parametrize(("quantization", "form"), [("int8", Form.INT8), ("int4", Form.INT4)])
def test_weights_take_the_memory_that_is_planned(
    products: Products, quantization: Any, form: Form
) -> None:
    packed = products.pack(torch.ones(64, 4096), form)
    planned = 64 * 4096 * weight_bytes(quantization, 4, "cpu")
    assert packed.memory.nbytes == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("exponent", [-130, -64, -40])
def test_the_smallest_numbers_are_summed_alike_in_few_rows_and_many(
    products: Products, exponent: int
) -> None:
    # Products of 2^-128 and inputs below 2^-126 are zeros to some instructions.
    x = (numbers(20, 96, torch.float32, seed=1) * 2.0**exponent).bfloat16()
    weight = numbers(40, 96, torch.float32, seed=2)
    weight[:, ::3] *= 2.0**-64
    packed = products.pack(weight.bfloat16(), Form.BFLOAT16)
    together = products.multiply(x, packed)
    for row in range(len(x)):
        assert torch.equal(products.multiply(x[row : row + 1], packed)[0], together[row])
