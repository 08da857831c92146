"""The requests of a run: lengths exact, prompts shared as far as asked, all of it repeatable."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chasqui.loadtest.lengths import Constant, LogNormal, Uniform
from chasqui.loadtest.workload import Workload, read_dialogs, work
from client import Determinism, Dialog, Limits, Model
from llama.v1 import chat_pb2

MODEL = Model(
    name="model",
    context_length=256,
    vocab_size=500,
    parameters=1,
    shards=1,
    replicas=1,
    dtype="float32",
    quantization="",
    fingerprint="",
    determinism=Determinism.UNSPECIFIED,
    limits=Limits(1, 1, 1, 1, 1, 1, 1, 1),
    sampling_defaults={},
)
WORKLOAD = Workload(Constant(32), Constant(8), 0, (), {"temperature": 0.0}, seed=0)

Prompts = list[tuple[int, ...]]


def requests(workload: Workload, count: int) -> list[chat_pb2.TextCompleteStreamRequest]:
    made = [each.request for each in islice(work(workload, MODEL), count)]
    return [each for each in made if isinstance(each, chat_pb2.TextCompleteStreamRequest)]


def prompts(workload: Workload, count: int) -> Prompts:
    return [tuple(each.prompt_ids[0].ids) for each in requests(workload, count)]


@given(
    st.sampled_from([Constant(1), Constant(900), Uniform(1, 400), LogNormal(100, 2.0)]),
    st.sampled_from([Constant(1), Constant(900), Uniform(1, 400), LogNormal(100, 2.0)]),
    st.integers(0, 300),
    st.integers(0, 2**64 - 1),
)
def test_prompt_and_answer_always_fit_the_context(
    prompt: Constant, answer: Constant, shared_prefix: int, seed: int
) -> None:
    workload = Workload(prompt, answer, shared_prefix, (), {}, seed)

    for request in requests(workload, 5):
        ids = request.prompt_ids[0].ids
        assert request.sampling.ignore_eos
        assert 1 <= request.sampling.max_gen_len <= MODEL.context_length - len(ids)
        assert all(3 <= token_id < MODEL.vocab_size for token_id in ids)


def test_lengths_within_the_context_are_exact() -> None:
    for each in islice(work(WORKLOAD, MODEL), 5):
        assert isinstance(each.request, chat_pb2.TextCompleteStreamRequest)
        assert len(each.request.prompt_ids[0].ids) == 32
        assert each.request.sampling.max_gen_len == 8
        assert not each.shortened


def test_what_the_context_does_not_hold_is_marked_as_shortened() -> None:
    workload = replace(WORKLOAD, answer_tokens=Constant(225))

    assert next(work(workload, MODEL)).shortened


@given(st.integers(0, 40))
def test_prompts_share_the_prefix_and_no_more(shared_prefix: int) -> None:
    made = prompts(replace(WORKLOAD, shared_prefix=shared_prefix), 8)

    shared = min(shared_prefix, 31)
    assert len({prompt[:shared] for prompt in made}) == 1
    assert len(set(made)) == 8


@given(st.integers(0, 2**64 - 1))
def test_the_seed_repeats_every_request(seed: int) -> None:
    workload = replace(WORKLOAD, prompt_tokens=Uniform(1, 99), seed=seed)

    assert requests(workload, 4) == requests(workload, 4)
    assert prompts(workload, 4) != prompts(replace(workload, seed=seed ^ 1), 4)


def test_dialogs_are_sent_in_turn_and_may_end_by_themselves() -> None:
    one: Dialog = [{"role": "user", "content": "one"}]
    two: Dialog = [{"role": "user", "content": "two"}]
    workload = replace(WORKLOAD, dialogs=[one, two])

    made = [each.request for each in islice(work(workload, MODEL), 3)]

    sent = [each for each in made if isinstance(each, chat_pb2.ChatCompleteStreamRequest)]
    contents = [each.dialogs[0].messages[0].content for each in sent]
    assert contents == ["one", "two", "one"]
    assert [each.sampling.max_gen_len for each in sent] == [8, 8, 8]
    assert not any(each.sampling.ignore_eos for each in sent)


def test_dialogs_are_read_as_arrays_and_as_objects(tmp_path: Path) -> None:
    file = tmp_path / "dialogs.jsonl"
    message = '{"role": "user", "content": "Hello"}'
    file.write_text(f'[{message}]\n\n{{"messages": [{message}], "id": 7}}\n')

    assert read_dialogs(file) == [[{"role": "user", "content": "Hello"}]] * 2


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "contains no dialogs"),
        ("[]\n{", "line 2 is not JSON"),
        ('{"dialog": []}', "line 1 is not a dialog"),
        ('["Hello"]', "line 1 is not a dialog"),
        ('[{"role": "robot", "content": "Hi"}]', r"line 1: .*role: must be .*, not 'robot'"),
        ('[{"role": "user"}]', "line 1: .*content: must be a text, not None"),
        (
            '[{"role": "user", "content": "a [/INST]"}]',
            r"line 1 contains \[/INST\], so it would not be answered",
        ),
    ],
)
def test_lines_that_are_no_dialogs_are_named(tmp_path: Path, lines: str, complaint: str) -> None:
    file = tmp_path / "dialogs.jsonl"
    file.write_text(lines)

    with pytest.raises(ValueError, match=complaint):
        read_dialogs(file)
