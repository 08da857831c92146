"""The backend of the mode that is batch-invariant on CUDA, in Triton's interpreter, beside
PyTorch's attention: what a step's vectors tell the kernels, also at a fixed batch size.
"""

from collections import defaultdict
from typing import Any

import pytest
import torch

from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading import load_replica
from model_service.loading.precision import Determinism, Precision
from model_service.model.attention.backend import CacheShape, SequenceSpan
from model_service.model.attention.sdpa import SdpaAttention
from model_service.model.graphs.decode_graphs import PADDING, FixedBatchAttention
from tests.model_service.conftest import CPU, spread

triton: Any = pytest.importorskip("triton", reason="Triton is not installed")
interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
split_attention: Any = pytest.importorskip("model_service.model.attention.split_attention")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="kernels run on the GPU here, or the interpreter is older than NumPy's newest",
)
SHAPE = CacheShape(layers=2, blocks=90, block_size=4, kv_heads=2, head_dim=8)
HEADS = 4
FLOAT32 = torch.float32


def backends() -> tuple[Any, Any]:
    """PyTorch's, and ours."""
    return (
        SdpaAttention(SHAPE, FLOAT32, CPU, FLOAT32),
        split_attention.SplitAttention(SHAPE, CPU, FLOAT32, heads=HEADS),
    )


def heads_of(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.randn(tokens, HEADS + 4, 8, generator=torch.Generator().manual_seed(seed))
    return made[:, :HEADS], made[:, HEADS:-2], made[:, -2:]


def prompts_written(attention: Any, spans: list[SequenceSpan]) -> None:
    """Computes all but the last token of each sequence."""
    before = [
        SequenceSpan(span.context_length - 1, span.context_length - 1, span.block_table)
        for span in spans
    ]
    attention.plan(before)
    attention.attend(1, *heads_of(sum(span.query_length for span in before), seed=1))


def test_a_mixed_step_attends_as_pytorch_does_by_one_compiled_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    types: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    launch = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        types[self.fn.__name__].append(tuple(getattr(each, "dtype", type(each)) for each in args))
        launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    lengths, queries = [140, 5, 30], [1, 1, 9]
    found = []
    for attention in backends():
        spans = spread(lengths, queries, SHAPE, seed=1)
        prompts_written(attention, spans)
        attention.plan(spans)
        found.append(attention.attend(1, *heads_of(11, seed=2)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert len(types["attend_tile"]) == 3  # of the prompts, and of this step both kinds
    assert len({*types["attend_tile"]}) == 1


def test_decode_at_a_fixed_size_gives_the_same_bits_with_padding() -> None:
    _, attention = backends()
    spans = spread([140, 5, 30], [1, 1, 1], SHAPE, seed=1)
    prompts_written(attention, spans)
    attention.plan(spans)
    query, key, value = heads_of(3, seed=2)
    expected = attention.attend(1, query, key, value)
    assert isinstance(attention, FixedBatchAttention)
    fixed = attention.fixed_batches([2, 4], context_length=160)[4]
    fixed.plan([PADDING] * 4)
    fixed.plan([*spans, PADDING])
    padded = (torch.cat((each, each[:1])) for each in (query, key, value))
    assert torch.equal(fixed.attend(1, *padded)[:3], expected)


@pytest.mark.thorough
def test_an_engine_in_this_mode_gives_metas_answers_alone_and_in_a_crowd(
    make_engine: Any, cases: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = Precision("cpu", FLOAT32, "none", FLOAT32, batch_invariant=True)
    assert precision.determinism is Determinism.BATCH_INVARIANT
    monkeypatch.setattr(load_replica, "choose_precision", lambda *_, **__: precision)
    answered = [case for case in cases("gqa") if not case["args"].get("echo")]
    chosen = sorted(answered, key=lambda case: len(case["prompt_ids"]))
    chosen = [case for case in chosen if len(case["ids"]) > 3][:3]
    requests = [
        GenerationRequest(
            case["id"], tuple(case["prompt_ids"]), 3, SamplingParams(0.0), logprobs=True
        )
        for case in chosen
    ]
    crowd = run(make_engine(max_batch_size=4, max_step_tokens=16), requests)
    for case in chosen:
        assert crowd[case["id"]].ids == case["ids"][:3]
        assert crowd[case["id"]].logprobs == pytest.approx(case["logprobs"][:3], abs=1e-4)
    first = requests[0].request_id
    alone = run(make_engine(max_batch_size=1), requests[:1])
    assert alone[first].logprobs == crowd[first].logprobs
