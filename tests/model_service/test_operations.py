import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model_service.model.config import LLAMA_3_SCALING, ROPE_THETA, RopeScaling
from model_service.model.operations import (
    FusedOperations,
    Operations,
    PlainOperations,
    rotary_frequencies,
)

TOKENS, QUERIES, KEYS, HEAD_DIM, DIM = 5, 4, 2, 8, 16


@pytest.fixture(params=["plain", "fused"])
def operations(request: Any, flashinfer: Any) -> Operations:
    rotary = rotary_frequencies(HEAD_DIM, 64)
    return PlainOperations(rotary) if request.param == "plain" else FusedOperations(rotary)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def test_norm_is_by_the_root_mean_square(operations: Operations) -> None:
    x, weight = random(TOKENS, DIM), random(DIM, seed=1)
    torch.testing.assert_close(operations.norm(x, weight, 1e-5), normed(x, weight))


def test_the_residual_is_added_before_the_norm_and_kept(operations: Operations) -> None:
    x, residual, weight = random(TOKENS, DIM), random(TOKENS, DIM, seed=2), random(DIM, seed=1)
    total = x + residual
    output, kept = operations.add_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(kept, total)
    torch.testing.assert_close(output, normed(total, weight))


def test_neighbouring_features_turn_by_position(operations: Operations) -> None:
    heads, positions = random(TOKENS, QUERIES + KEYS, HEAD_DIM), torch.tensor([0, 7, 3, 63, 7])
    expected = torch.empty_like(heads)
    for token, position in enumerate(positions.tolist()):
        for pair in range(HEAD_DIM // 2):
            angle = position / ROPE_THETA ** (2 * pair / HEAD_DIM)
            a, b = heads[token, :, 2 * pair], heads[token, :, 2 * pair + 1]
            expected[token, :, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            expected[token, :, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    rotated = operations.rotate(heads, QUERIES, operations.rotation(positions))
    torch.testing.assert_close(rotated, expected)


def frequencies(theta: float, scaling: RopeScaling | None) -> list[float]:
    """Radians per token of each pair of a head of 64 features."""
    rotary = rotary_frequencies(64, 2, theta, scaling)
    return [float(angle) for angle in rotary[1].angle()]


def test_frequencies_have_the_base_of_the_checkpoint() -> None:
    expected = [1e6 ** (-pair / 32) for pair in range(32)]
    assert frequencies(1e6, None) == pytest.approx(expected)
    linear = frequencies(1e6, RopeScaling("linear", 4))
    assert linear == pytest.approx([frequency / 4 for frequency in expected])


def test_low_frequencies_of_llama_3_are_divided_and_high_ones_kept() -> None:
    expected = []
    for pair in range(32):  # `apply_scaling` in the llama/model.py of Meta's Llama 3, in float64
        frequency = 500000.0 ** (-pair / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert frequencies(500000.0, LLAMA_3_SCALING) == pytest.approx(expected, rel=1e-5)


def test_the_gate_is_the_first_half(operations: Operations) -> None:
    x = random(TOKENS, 2 * DIM)
    torch.testing.assert_close(operations.gate(x), F.silu(x[:, :DIM]) * x[:, DIM:])
