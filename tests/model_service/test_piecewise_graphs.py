"""Steps of any mixture in recorded pieces, on the CPU: a record repeats operations on its tensors,
without the code that called them.
"""

import importlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.engine.engine import Engine
from model_service.engine.step.plan_channel import PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading.first_steps.warm_up import warm_up
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.attention.backend import CacheShape, SequenceSpan
from model_service.model.graphs.decode_graphs import DecodeGraphs
from model_service.model.graphs.piecewise_attention import SeparableAttention
from model_service.model.graphs.piecewise_graphs import SIZES, PiecewiseGraphs, sizes_up_to
from model_service.model.graphs.step_graphs import StepGraphs
from model_service.model.network import Transformer
from tests.model_service.conftest import CONTEXT, CPU, GOLDEN, spread
from tests.model_service.piecewise_ranks import network_by_pytorch
from tests.model_service.recorders import Rerun, Tape, TapeRecorder
from tests.model_service.test_launches import Launches

HEADS = 8  # of gqa-mp1
SHAPE = CacheShape(layers=3, blocks=160, block_size=4, kv_heads=4, head_dim=8)
FLOATS = {"float32": torch.float32, "fp8": torch.float8_e4m3fn}
CHECKPOINT: Path = GOLDEN / "checkpoints" / "gqa-mp1"


class NoNetwork:
    """A network for steps that are all recorded."""

    def forward(self, *_: object) -> torch.Tensor:
        raise AssertionError("a step is not recorded")


@pytest.fixture(scope="module")
def network(flashinfer: Any) -> Transformer:
    return network_by_pytorch(CHECKPOINT)[0]


def record(network: Transformer, attention: Any, max_step_tokens: int = 64) -> PiecewiseGraphs:
    return PiecewiseGraphs(
        network, attention, max_step_tokens=max_step_tokens, device=CPU, record=TapeRecorder()
    )


def caches(attention: Any) -> list[torch.Tensor]:
    """Bits of keys and values [layers, blocks, …], filled alike."""
    held = attention._cache
    both = [each.view(SHAPE.layers, SHAPE.blocks, -1) for each in (held._keys, held._values)]
    for each in both:
        filling = torch.randn(each.shape, generator=torch.Generator().manual_seed(1))
        each.copy_(filling.to(each.dtype))
    return [each.view({1: torch.uint8, 4: torch.int32}[each.itemsize]) for each in both]


@pytest.fixture(scope="module", params=FLOATS)
def pair(request: Any, backends: Any, network: Transformer) -> tuple[Any, Any, PiecewiseGraphs]:
    """A backend to run plainly, one to run in pieces, and the records of that."""
    plainly, in_pieces = (backends["flashinfer"](SHAPE, HEADS, FLOATS[request.param]) for _ in "ab")
    assert isinstance(in_pieces, SeparableAttention)
    return plainly, in_pieces, record(network, in_pieces)


@st.composite
def mixtures(draw: Any) -> list[tuple[int, int]]:
    """Tokens in the step and in the cache of each sequence: first those that decode."""
    decodes = draw(st.lists(st.tuples(st.just(1), st.integers(1, 30)), max_size=8))
    others = draw(st.lists(st.tuples(st.integers(1, 14), st.integers(0, 25)), max_size=4))
    spans = decodes + [(query, query + before) for query, before in others]
    return spans or [(3, 3)]


def arguments(
    spans: list[SequenceSpan], seed: int
) -> tuple[list[SequenceSpan], torch.Tensor, torch.Tensor]:
    """Random tokens of a step, at their positions."""
    ends = [torch.arange(span.context_length)[-span.query_length :] for span in spans]
    positions = torch.cat(ends)
    generator = torch.Generator().manual_seed(seed)
    return spans, torch.randint(0, 100, positions.shape, generator=generator), positions


@settings(max_examples=30)
@given(mixture=mixtures(), seed=st.integers(0, 1000), data=st.data())
def test_any_mixture_in_pieces_gives_the_same_logits_and_changes_no_other_block(
    network: Transformer, pair: Any, mixture: Any, seed: int, data: Any
) -> None:
    plainly, in_pieces, graphs = pair
    queries, contexts = zip(*mixture, strict=True)
    spans, tokens, positions = arguments(spread(contexts, queries, SHAPE, seed), seed)
    wanted = data.draw(st.sets(st.integers(0, len(tokens) - 1)))
    rows = torch.tensor(sorted(wanted), dtype=torch.long)
    expected_caches, found_caches = caches(plainly), caches(in_pieces)
    plainly.plan(spans)
    expected = network(tokens, positions, rows, plainly)
    found = graphs.forward(spans, tokens, positions, rows)
    # Products of another number of rows add in another order, after which a code of 8 bits may be
    # the one beside it.
    kind = plainly._cache._keys.dtype
    near, step = (0.05, 0.13) if kind.itemsize == 1 else (1e-4, 1e-4)
    torch.testing.assert_close(found, expected, atol=near, rtol=1e-4)
    for ours, theirs in zip(found_caches, expected_caches, strict=True):
        values, exact = (each[:, 1:].view(kind).float() for each in (ours, theirs))
        torch.testing.assert_close(values, exact, atol=near, rtol=step)
        written = {block for span in spans for block in span.block_table}
        others = [block for block in range(1, SHAPE.blocks) if block not in written]
        assert torch.equal(ours[:, others], theirs[:, others])


def test_steps_above_the_largest_size_are_left_to_the_plain_path(pair: Any) -> None:
    graphs = pair[2]
    assert graphs.max_tokens == 64
    spans, tokens, positions = arguments(spread([65], [65], SHAPE, seed=0), seed=0)
    assert graphs.forward(spans, tokens, positions, torch.tensor([64])) is None


@pytest.mark.parametrize(
    ("max_step_tokens", "largest"), [(1, 16), (16, 16), (17, 32), (512, 512), (4096, 512)]
)
def test_sizes_reach_the_largest_step_or_their_end(max_step_tokens: int, largest: int) -> None:
    assert sizes_up_to(max_step_tokens)[-1] == largest
    assert sizes_up_to(max_step_tokens) == SIZES[: len(sizes_up_to(max_step_tokens))]
    for below, size in pairwise(SIZES):
        assert size <= max(below + 32, 1.25 * below)


def test_golden_cases_with_all_steps_recorded(
    network: Transformer, backends: Any, cases: Any, request_for: Any, run: Any
) -> None:
    options = ReplicaOptions(
        CHECKPOINT,
        CONTEXT,
        dtype="float32",
        device="cpu",
        max_batch_size=40,
        max_step_tokens=90,
        draft_tokens=4,
        block_size=SHAPE.block_size,
    )
    limits = load_replica(options).limits
    shape = CacheShape(SHAPE.layers, limits.blocks + 1, SHAPE.block_size, 4, 8)
    attention = backends["flashinfer"](shape, HEADS)
    pieces = record(network, attention, limits.max_step_tokens)
    decode = DecodeGraphs(
        network,
        attention,
        max_batch_size=limits.max_batch_size,
        context_length=CONTEXT,
        device=CPU,
        record=Rerun(),
    )
    graphs = StepGraphs(decode, pieces)
    runner = ModelRunner(cast(Transformer, NoNetwork()), attention, PlanChannel(), CPU, graphs)
    assert runner.recorded_tokens == graphs.max_tokens == 96
    warm_up(runner, limits)
    golden = cases("gqa")
    answers = run(Engine(runner, limits), [request_for(case) for case in golden])
    assert [answers[case["id"]].ids for case in golden] == [case["ids"] for case in golden]
    for case in golden:
        assert answers[case["id"]].logprobs == pytest.approx(case["logprobs"], abs=1e-4)


def test_ranks_repeat_pieces_together() -> None:
    script = str(Path(__file__).with_name("piecewise_ranks.py"))
    launcher = [sys.executable, "-m", "model_service.launcher", "--shards=2"]
    command = [*launcher, script, str(CHECKPOINT)]
    root = str(Path(__file__).parents[2])  # where the script finds the tests' own modules
    made = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": root},
    ).stdout
    recorded, plainly = map(json.loads, made.splitlines())
    assert len(recorded) == 12
    assert recorded == plainly


def test_a_layer_of_a_mixed_step_takes_the_host_three_launches_instead_of_ten(
    network: Transformer, backends: Any, flashinfer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches()
    module = importlib.import_module("model_service.model.attention.flashinfer")
    for owner, name in (
        (flashinfer, "fused_add_rmsnorm"),
        (flashinfer, "silu_and_mul"),
        (flashinfer.BatchDecodeWithPagedKVCacheWrapper, "run"),
        (flashinfer.BatchPrefillWithPagedKVCacheWrapper, "run"),
        (module, "rotate_and_write"),
        (Tape, "replay"),
    ):
        monkeypatch.setattr(owner, name, launches.counted(getattr(owner, name)))
    attention = backends["flashinfer"](SHAPE, HEADS)
    graphs = record(network, attention)
    spans, tokens, positions = arguments(spread([9, 14], [1, 6], SHAPE, seed=1), seed=1)
    rows = torch.tensor([0, 6])
    launches.names.clear()
    attention.plan(spans)
    with launches:
        network(tokens, positions, rows, attention)
    plainly, launches.names = launches.names, []
    with launches:
        graphs.forward(spans, tokens, positions, rows)
    attended = ["rotate_and_write", "run", "run", "linear", "fused_add_rmsnorm"]
    rest = ["linear", "silu_and_mul", "linear", "fused_add_rmsnorm", "linear"]
    first = plainly.index("rotate_and_write")
    assert plainly[first : first + 20] == [*attended, *rest] * 2
    buffers = ["copy_", "zero_"] * 3  # slots, tokens, positions
    pieces = [*["replay", "run", "run"] * SHAPE.layers, "replay"]
    head = ["index", "index", "fused_add_rmsnorm", "linear"]
    assert launches.names[launches.names.index("copy_") :] == [*buffers, *pieces, *head]
