"""FlashInfer's kernels against the reference, where there is a CUDA device and FlashInfer."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_service.model.attention.backend import CacheShape
from model_service.model.attention.rotation import Rotary, attend_rotated
from model_service.model.attention.sdpa import SdpaAttention
from model_service.model.attention.select import make_attention
from model_service.model.graphs.decode_graphs import PADDING, FixedBatchAttention
from model_service.model.graphs.piecewise_attention import PieceBuffers, PiecewiseAttention
from model_service.model.graphs.recorder import GraphRecorder
from model_service.model.operations import FusedOperations, PlainOperations, rotary_frequencies
from tests.model_service.conftest import spread

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flashinfer") is None,
    reason="no CUDA device, or no FlashInfer",
)
DEVICE = torch.device("cuda", 0)
SHAPE = CacheShape(layers=1, blocks=200, block_size=16, kv_heads=4, head_dim=128)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(params=[1, 8], ids=["alone", "grouped"])
def heads(request: Any) -> int:
    """Query heads: as many as key heads, and eight for each."""
    return SHAPE.kv_heads * int(request.param)


@pytest.fixture(params=[torch.bfloat16, FLOAT8], ids=["bfloat16", "fp8"])
def pair(request: Any, heads: int) -> tuple[Any, SdpaAttention]:
    """FlashInfer and the reference, their caches filled alike."""
    arguments = (SHAPE, torch.bfloat16, DEVICE, request.param)
    fast = make_attention(*arguments, heads=heads, max_batch_size=8)
    assert isinstance(fast, FixedBatchAttention)
    reference = SdpaAttention(*arguments)
    for name in ("_keys", "_values"):
        filling = torch.randn(SHAPE.blocks, 16, 4, 128, device=DEVICE).to(request.param)
        held = getattr(reference, name)
        held.copy_(filling.view(held.dtype).view(held.shape))
        getattr(fast._cache, name).view(held.dtype).copy_(filling.view(held.dtype).unsqueeze(0))  # type: ignore[attr-defined]
    return fast, reference


def tensors(tokens: int, heads: int) -> list[torch.Tensor]:
    """Queries, keys and values, as strided as the network's."""
    every = torch.randn(tokens, heads + 8, 128, dtype=torch.bfloat16, device=DEVICE)
    return [every[:, :heads], every[:, heads : heads + 4], every[:, heads + 4 :]]


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [([300, 17, 1], [1, 1, 1]), ([300, 90], [300, 33]), ([300, 17, 80, 16], [1, 1, 80, 3])],
    ids=["decode", "prefill", "mixed"],
)
def test_flashinfer_attends_as_the_reference(
    pair: Any, heads: int, lengths: list[int], queries: list[int]
) -> None:
    spans = spread(lengths, queries, SHAPE, seed=1)
    flat = tensors(sum(queries), heads)
    outputs = []
    for backend in pair:
        backend.plan(spans)
        outputs.append(backend.attend(0, *flat))
    torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_backend_rotates_as_the_reference_rotated_before(
    pair: Any, heads: int, tokens: int
) -> None:
    operations = PlainOperations(rotary_frequencies(128, 512).to(DEVICE))
    rotation = operations.rotation(torch.arange(300 - tokens, 300, device=DEVICE))
    rotary = Rotary(operations.rotate, rotation)
    spans = spread([300], [tokens], SHAPE, seed=3)
    every = torch.randn(tokens, heads + 8, 128, dtype=torch.bfloat16, device=DEVICE)
    outputs = []
    for backend in pair:
        backend.plan(spans)
        outputs.append(attend_rotated(backend, 0, every.clone(), heads, rotary))
    torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)


def test_a_recorded_batch_follows_its_plans(pair: Any, heads: int) -> None:
    fast, reference = pair
    fixed = fast.fixed_batches([4], context_length=512)[4]
    flat = tensors(4, heads)
    output = torch.empty(4, heads, 128, dtype=torch.bfloat16, device=DEVICE)
    fixed.plan([PADDING] * 4)
    repeat: Callable[[], object] = GraphRecorder()(lambda: output.copy_(fixed.attend(0, *flat)))
    for lengths in ([5, 400, 33], [17, 1, 256]):
        spans = spread(lengths, [1] * 3, SHAPE, seed=2)
        reference.plan(spans)
        fixed.plan([*spans, PADDING])
        repeat()
        expected = reference.attend(0, *(x[:3] for x in flat))
        torch.testing.assert_close(output[:3], expected, atol=2e-2, rtol=2e-2)


def test_attention_between_recorded_pieces_follows_any_plan(pair: Any, heads: int) -> None:
    fast, reference = pair
    record = GraphRecorder()
    buffers = PieceBuffers.of(16, (heads, 128), torch.bfloat16, DEVICE)
    in_pieces = PiecewiseAttention(fast, buffers, record.between)
    flat = tensors(16, heads)
    output = torch.empty(16, heads, 128, dtype=torch.bfloat16, device=DEVICE)
    in_pieces.plan([PADDING])
    repeat = record(lambda: output.copy_(in_pieces.attend(0, *flat)))
    for lengths, queries in (([5, 400, 33], [1, 1, 9]), ([17, 256], [4, 12]), ([300], [1])):
        spans, tokens = spread(lengths, queries, SHAPE, seed=2), sum(queries)
        for backend in (reference, in_pieces):
            backend.plan(spans)
        repeat()
        expected = reference.attend(0, *(x[:tokens] for x in flat))
        torch.testing.assert_close(output[:tokens], expected, atol=2e-2, rtol=2e-2)


def test_fused_operations_compute_as_the_plain_ones() -> None:
    rotary = rotary_frequencies(128, 64).to(DEVICE)
    x, residual, weight, heads = (
        torch.randn(*size, dtype=torch.bfloat16, device=DEVICE)
        for size in ((9, 256), (9, 256), (256,), (9, 6, 128))
    )
    positions = torch.arange(0, 63, 7, device=DEVICE)
    results = []
    for operations in (PlainOperations(rotary), FusedOperations(rotary)):
        rotation = operations.rotation(positions)
        results.append(
            [
                operations.norm(x, weight, 1e-5),
                *operations.add_norm(x.clone(), residual.clone(), weight, 1e-5),
                operations.rotate(heads.clone(), 4, rotation),
                operations.gate(x),
            ]
        )
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=3e-2, rtol=3e-2)
