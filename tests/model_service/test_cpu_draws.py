"""Draws by the compiled library, beside those of the host's sampler from the same probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model_service.engine.sampling.columns import draw_columns
from model_service.engine.sampling.host.penalties import SamplingRow
from model_service.engine.sampling.host.sampler import sample
from model_service.engine.sampling.host.truncation import choose
from model_service.engine.sequence import SamplingParams
from model_service.model.cpu.draws import Draw, draw
from model_service.model.cpu.kernels import without_kernels
from model_service.model.cpu.layers import Scan

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(without_kernels()), reason=without_kernels()),
]

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-38, 0.1, 0.6, 1.0, 2.0, 50.0]),
    top_p=st.sampled_from([0.001, 0.3, 0.5, 0.9, 0.999999, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 700, 10**6]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


def made_logits(kind: str, rows: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, vocab, generator=generator)
    return {
        "spread": 4 * normal,
        "flat": 0.01 * normal,
        "steep": 40 * normal,
        "ties": normal.round(),
        "equal": torch.zeros(rows, vocab),
        "huge": 3e38 * normal.clamp(-1, 1),
    }[kind]


def scan_of(logits: torch.Tensor) -> Scan:
    return Scan([], [], logits.data_ptr(), logits.shape[-1])


def draws_of(params: list[SamplingParams], positions: list[int], vocab: int) -> list[Draw]:
    return [
        Draw(row, min(p.top_k or vocab, vocab), p.temperature, p.min_p, p.top_p, p.seed, position)
        for row, (p, position) in enumerate(zip(params, positions, strict=True))
    ]


@given(
    batch=st.lists(st.tuples(PARAMS, st.integers(0, 2**33)), min_size=1, max_size=5),
    kind=st.sampled_from(["spread", "flat", "steep", "ties", "equal", "huge"]),
    vocab=st.sampled_from([1, 7, 16, 33, 560, 5000]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=300, deadline=None)
# Every token counts, and the most probable ones are more than any first guess holds.
@example(batch=[(SamplingParams(1.0, top_p=0.999999, seed=1), 5)], kind="flat", vocab=5000, seed=0)
def test_the_same_probabilities_give_the_same_tokens(
    batch: list[tuple[SamplingParams, int]], kind: str, vocab: int, seed: int
) -> None:
    params, positions = [each for each, _ in batch], [position for _, position in batch]
    logits = made_logits(kind, len(batch), vocab, seed)
    probabilities = np.empty((len(batch), vocab), dtype=np.float32)
    tokens = draw(scan_of(logits), draws_of(params, positions, vocab), probabilities)
    columns = draw_columns(params, positions, vocab)
    assert tokens == choose(torch.from_numpy(probabilities), columns).tolist()
    temperature = torch.tensor([[each.temperature] for each in params])
    largest = torch.finfo(torch.float32).max
    scaled = (logits / temperature).clamp(-largest, largest)
    expected = torch.softmax(scaled.double(), dim=-1)
    torch.testing.assert_close(
        torch.from_numpy(probabilities).double(), expected, rtol=1e-4, atol=1e-7
    )


def test_a_draw_is_the_same_alone_and_beside_others() -> None:
    logits = made_logits("spread", 64, 3000, seed=3)
    params = [SamplingParams(0.8, top_p=0.95, seed=seed) for seed in range(64)]
    draws = draws_of(params, [9] * 64, 3000)
    together = draw(scan_of(logits), draws)
    assert together == [draw(scan_of(logits), [each])[0] for each in draws]
    assert together[::-1] == draw(scan_of(logits), draws[::-1])


def test_a_thousand_draws_are_those_of_the_sampler_in_pytorch() -> None:
    logits = made_logits("spread", 1000, 560, seed=4)
    params = [SamplingParams(0.7, top_p=0.9, seed=seed) for seed in range(1000)]
    rows = [SamplingRow(each, [1] * 9, 0) for each in params]
    assert draw(scan_of(logits), draws_of(params, [9] * 1000, 560)) == sample(logits, rows)
