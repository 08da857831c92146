from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model_service.model.weights.matrices import (
    PackedWeight,
    pack_fp8,
    pack_int4,
    pack_int8,
    prepack,
)

pytestmark = pytest.mark.kernels

ROUNDING = {"prepack": 1e-5, "int8": 0.03, "int4": 0.15, "fp8": 0.05}
PACK: dict[str, Any] = {
    "prepack": prepack,
    "int8": pack_int8,
    "int4": pack_int4,
    "fp8": pack_fp8(),
}


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1024, 1024, generator=generator) / 32


def activations(rows: int, width: int = 1024) -> torch.Tensor:
    """Rows of very different size, as outliers make them."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-2, 2, rows).unsqueeze(1)
    return torch.randn(rows, width, generator=generator) * sizes


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("rows", [1, 2, 3, 70])
def test_packed_weight_multiplies_as_the_plain_one(
    name: str, rows: int, weight: torch.Tensor
) -> None:
    x = activations(rows)
    packed = PACK[name](weight)
    assert isinstance(packed, PackedWeight)
    exact = F.linear(x, weight)
    error = (packed.multiply(x) - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < ROUNDING[name]


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_row_does_not_depend_on_its_neighbours(name: str, rows: int, weight: torch.Tensor) -> None:
    x = activations(8)
    packed = PACK[name](weight)
    in_parts = torch.cat([F.linear(part, packed) for part in torch.split(x, rows)])
    torch.testing.assert_close(F.linear(x, packed), in_parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_zeros_stay_zeros_and_a_nan_spoils_its_row_alone(name: str, weight: torch.Tensor) -> None:
    x = activations(3)
    x[0], x[1, 5] = 0.0, torch.nan
    product = F.linear(x, PACK[name](weight))
    assert (product[0] == 0).all()
    assert product[1].isnan().all()
    assert product[2].isfinite().all()


def test_small_matrix_stays_plain() -> None:
    small = torch.zeros(64, 64)
    assert prepack(small) is small


def test_packed_weight_refuses_other_uses(weight: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"serves F\.linear alone"):
        torch.add(weight, PACK["prepack"](weight))
