"""The sampler that never looks at a number on the host, against the one that does."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_service.engine.limits import EngineLimits
from model_service.engine.sampling.columns import DrawColumns
from model_service.engine.sampling.device.sampler import DeviceSampler
from model_service.engine.sampling.device.truncation import draw, truncate
from model_service.engine.sampling.host.step_sampling import HostSampling
from model_service.engine.sampling.result import StepResult
from model_service.engine.sequence import GenerationRequest, SamplingParams, Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow
from model_service.loading.first_steps.warm_up import warm_up_sampling
from model_service.model.cuda.pinned_transfer import upload_packed

CPU = torch.device("cpu")
VOCABS = 5, 300, 1040, 9001

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 1e-45, 0.1, 0.6, 1.0, 1.5, 1e6)),
    top_p=st.sampled_from((0.0, 0.5, 0.9, 1.0)),
    top_k=st.sampled_from((None, 1, 3, 50, 100_000)),
    min_p=st.sampled_from((0.0, 0.0, 0.05, 1.0)),
    min_gen_len=st.sampled_from((0, 0, 1, 2, 9)),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from((1.0, 1.0, 0.7, 1.3)),
    presence_penalty=st.sampled_from((0.0, 0.0, 0.4)),
    frequency_penalty=st.sampled_from((0.0, 0.0, 0.3)),
    logit_bias=st.dictionaries(st.integers(0, 4), st.floats(-100, 100, width=32), max_size=3),
)


@st.composite
def sequences(choose: st.DrawFn) -> Sequence:
    """One whose tokens are ids below 5, part of them an answer."""
    prompt = choose(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    request = GenerationRequest(
        0,
        tuple(prompt),
        1000,
        choose(params),
        stop_ids=choose(st.frozensets(st.integers(0, 4), max_size=2)),
        offset=choose(st.integers(0, len(prompt) - 1)),
        logprobs=choose(st.booleans()),
        prompt_logprobs=choose(st.booleans()),
        top_logprobs=choose(st.integers(0, 4)),
        logprob_token_ids=choose(st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    )
    return Sequence.from_request(request, 4096, 0)


def rows_of(sequence: Sequence, *, first: bool) -> list[LogitRow]:
    """The rows of the next step; at first also those of the prompt, if they are wanted."""
    length = len(sequence.tokens)
    scored = range(1, length) if first and sequence.request.prompt_logprobs else ()
    return [LogitRow(sequence, position, []) for position in (*scored, length)]


def made_logits(data: st.DataObject, rows: int, vocab: int) -> torch.Tensor:
    """Flat, peaked or random, with or without ties; now and then a row that is not finite."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, vocab, generator=generator)
    logits *= data.draw(st.sampled_from((0.0, 1e-4, 1.0, 8.0)))
    if step := data.draw(st.sampled_from((0.0, 0.5, 2.0))):
        logits = (logits / step).round() * step
    if data.draw(st.integers(0, 4)) == 0:
        logits[data.draw(st.integers(0, rows - 1)), -1] = math.nan
    return logits


def values(entry: TokenLogprobs | None) -> list[float]:
    """Without the ids of alternatives: which of equal ones is named depends on other rows."""
    if entry is None:
        return []
    top = [value for _, value in entry.top]
    return [entry.logprob, entry.rank, *top, *entry.requested]


def made_of(result: StepResult) -> dict[Sequence, list[tuple[int, list[float]]]]:
    return {s: [(t.id, values(t.logprobs)) for t in made] for s, made in result.tokens.items()}


def prompts(result: StepResult) -> dict[Sequence, list[list[float]]]:
    counting = {s: e for s, e in result.prompt_logprobs.items() if s not in result.failed}
    return {sequence: [*map(values, entries)] for sequence, entries in counting.items()}


def enter(result: StepResult) -> None:
    for sequence, made in result.tokens.items():
        sequence.tokens.append(made[0].id)


def runs_on(sequence: Sequence, result: StepResult) -> bool:
    """Whether it neither failed nor drew one of its stop ids."""
    stopped = sequence.tokens[-1] in sequence.request.stop_ids
    return sequence not in result.failed and not stopped


@settings(max_examples=60)
@given(st.data(), st.lists(sequences(), min_size=1, max_size=5), st.sampled_from(VOCABS))
def test_it_makes_what_the_sampler_on_the_host_makes(
    data: st.DataObject, batch: list[Sequence], vocab: int
) -> None:
    sampler = DeviceSampler(vocab, CPU)
    for step in range(3):
        rows = [row for sequence in batch for row in rows_of(sequence, first=step == 0)]
        logits = made_logits(data, len(rows), vocab)
        expected = HostSampling(rows, logits.clone()).read()
        made = sampler.launch(rows, logits).read()
        assert made.failed == expected.failed
        assert made_of(made) == made_of(expected)
        assert prompts(made) == prompts(expected)
        enter(expected)
        batch = [sequence for sequence in batch if runs_on(sequence, made)]
        if not batch:
            return


@settings(max_examples=10)
@given(st.lists(sequences(), min_size=1, max_size=5), st.sampled_from(VOCABS))
def test_nothing_is_decided_by_a_number_on_the_device(batch: list[Sequence], vocab: int) -> None:
    """The meta device has no numbers: looking at one raises."""
    meta = torch.device("meta")
    rows = [row for sequence in batch for row in rows_of(sequence, first=True)]
    launched = DeviceSampler(vocab, meta).launch(rows, torch.empty(len(rows), vocab, device=meta))
    assert launched.sampled.device.type == "meta"
    assert launched.sampled.shape == (len(batch),)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        tensors = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.bytes = max([self.bytes, *(each.nbytes for each in tensors)])
        return made


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_large_batch_is_drawn_in_parts_no_larger_than_its_logits(top_p: float) -> None:
    request = GenerationRequest(0, (1,), 9, SamplingParams(1.0, top_p))
    rows = [LogitRow(Sequence.from_request(request, 99, 0), 1, []) for _ in range(600)]
    logits = torch.zeros(len(rows), 50)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        launched = DeviceSampler(50, CPU).launch(rows, logits)
    assert len(launched.read().tokens) == len(rows)
    assert largest.bytes <= logits.nbytes


def test_warm_up_reaches_the_largest_draw_and_the_largest_scoring(monkeypatch: Any) -> None:
    launched = []

    def launch(_: DeviceSampler, rows: list[LogitRow], logits: torch.Tensor) -> None:
        launched.append(([row.in_prompt for row in rows], logits.shape))

    monkeypatch.setattr(DeviceSampler, "launch", launch)
    limits = EngineLimits(
        context_length=64,
        vocab_size=30,
        max_batch_size=3,
        max_step_tokens=100,
        blocks=4,
        block_size=16,
        prefix_cache=True,
        max_stall=2.0,
        draft_tokens=0,
    )
    warm_up_sampling(limits, CPU)
    assert launched == [([False] * 3, (3, 30)), ([True] * 99 + [False], (100, 30))]


def test_a_forgotten_sequence_leaves_nothing_to_the_next_in_its_slot() -> None:
    sampler = DeviceSampler(9, CPU)
    logits = torch.arange(9).float().unsqueeze(0)
    for _ in range(3):
        sampling = SamplingParams(0.0, presence_penalty=5.0, logit_bias={1: 7.5})
        sequence = Sequence.from_request(GenerationRequest(0, (1,), 9, sampling), 99, 0)
        drawn = []
        for _ in range(3):
            result = sampler.launch(rows_of(sequence, first=False), logits).read()
            drawn.append(result.tokens[sequence][0].id)
            enter(result)
        assert drawn == [1, 8, 7]
        sampler.forget(sequence)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gets_an_id_of_the_vocabulary(bad: float) -> None:
    """The next step, launched already, looks it up."""
    sampler = DeviceSampler(40, CPU)
    logits = torch.full((3, 40), bad)
    batch = [
        Sequence.from_request(GenerationRequest(i, (1,), 9, SamplingParams(t, top_p)), 99, i)
        for i, (t, top_p) in enumerate(((0.0, 1.0), (0.8, 0.9), (0.8, 1.0)))
    ]
    launched = sampler.launch([row for s in batch for row in rows_of(s, first=False)], logits)
    assert ((launched.sampled >= 0) & (launched.sampled < 40)).all()
    assert launched.read().failed == dict.fromkeys(batch, 1)


def metas_set(probabilities: torch.Tensor, top_p: float) -> set[int]:
    """The set that `sample_top_p` in Meta's llama/generation.py keeps, statement by statement."""
    probs_sort, probs_idx = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    probs_sum = torch.cumsum(probs_sort, dim=-1)
    probs_sort[probs_sum - probs_sort > top_p] = 0.0
    return {int(i) for i, p in zip(probs_idx[0], probs_sort[0], strict=True) if p > 0}


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60),
    top_p=st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.just(0.0)),
)
def test_top_p_keeps_exactly_metas_set(logits: list[float], top_p: float) -> None:
    probabilities = torch.softmax(torch.tensor([logits]), dim=-1)
    rules = DrawColumns(
        top_k=torch.tensor([[len(logits)]]),
        min_p=torch.zeros(1, 1),
        top_p=torch.tensor([[top_p]]),
        uniform=torch.zeros(1, 1),
    )
    kept = set(truncate(probabilities, rules)[0].nonzero().flatten().tolist())
    assert kept == metas_set(probabilities, top_p)


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30).filter(any))
def test_a_draw_never_takes_a_token_without_weight(weights: list[float]) -> None:
    for uniform in (0.0, 0.5, 1 - 2**-32):
        token = int(draw(torch.tensor([weights]), torch.tensor([[uniform]], dtype=torch.float64)))
        assert weights[token] > 0


def test_one_copy_brings_arrays_of_any_shape_and_type() -> None:
    arrays: list[np.ndarray[Any, Any]] = [
        np.arange(5, dtype=np.int64),
        np.empty((0, 3), dtype=np.float32),
        np.array([[1.5], [2.5]], dtype=np.float32),
        np.array([True, False, True]),
        np.array([[0.1]]),
    ]
    (empty,) = upload_packed(CPU, [np.empty(0, dtype=np.int64)])
    assert (empty.shape, empty.dtype) == ((0,), torch.int64)
    for array, tensor in zip(arrays, upload_packed(CPU, arrays), strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert tensor.shape == array.shape
        assert np.array_equal(tensor.numpy(), array)
