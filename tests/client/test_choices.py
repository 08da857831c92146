"""Several answers to one dialog: both clients, and the `chasqui` command."""

import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chasqui.cli.chat import in_turn
from client import (
    AsyncClient,
    Client,
    Delta,
    Event,
    Finished,
    FinishReason,
    Message,
    Started,
    results,
)
from client.results import Determinism, Usage
from llama.v1 import chat_pb2

Run = Callable[..., "subprocess.CompletedProcess[str]"]
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
SAMPLED: Any = {"temperature": 1.2, "seed": 2**64 - 1, "max_gen_len": 12}
USAGE = Usage(1, 0, 1, *[timedelta()] * 5)


def test_each_choice_is_the_answer_to_its_own_seed(target: str) -> None:
    with Client(target) as client:
        answers = client.chat_choices(HELLO, 3, **SAMPLED)
        alone = [client.chat(HELLO, **{**SAMPLED, "seed": each.seed}) for each in answers]

    assert [each.choice_index for each in answers] == [0, 1, 2]
    assert [each.seed for each in answers] == [2**64 - 1, 0, 1]
    assert [each.text for each in answers] == [each.text for each in alone]


async def test_both_clients_give_the_same_choices(target: str) -> None:
    with Client(target) as client:
        chats = client.chat_choices(HELLO, 2, **SAMPLED)
        texts = client.complete_many(["Once", "Twice"], n=2, **SAMPLED)
    async with AsyncClient(target) as asyncio_client:
        again = await asyncio_client.chat_choices(HELLO, 2, **SAMPLED)
        events = [
            event
            async for event in asyncio_client.complete_stream_many(
                ["Once", "Twice"], n=2, **SAMPLED
            )
        ]

    assert [each.text for each in again] == [each.text for each in chats]
    assert [each.choice_index for each in texts] == [0, 1, 0, 1]
    assert joined(events) == {
        (0, 0): texts[0].text,
        (0, 1): texts[1].text,
        (1, 0): texts[2].text,
        (1, 1): texts[3].text,
    }


def joined(events: list[Event]) -> dict[tuple[int, int], str]:
    """The text of each answer."""
    texts = {(each.index, each.choice_index): "" for each in events}
    for event in events:
        if isinstance(event, Delta):
            texts[event.index, event.choice_index] += event.text
    return texts


def test_one_answer_takes_no_n(target: str) -> None:
    with Client(target) as client, pytest.raises(TypeError, match="'n'"):
        client.chat(HELLO, n=2)  # type: ignore[call-arg]


def test_prompt_tokens_from_the_cache_are_told() -> None:
    usage = chat_pb2.Usage(prompt_tokens=9, cached_prompt_tokens=8)
    answer = results.prediction(chat_pb2.Prediction(usage=usage, choice_index=2))

    assert answer.usage.cached_prompt_tokens == 8
    assert answer.choice_index == 2


def test_results_tell_of_lost_replicas_and_of_the_classifiers_findings() -> None:
    found: dict[str, Any] = {"failovers": 2, "safety_categories": ["weapons"]}
    finished = chat_pb2.StreamEvent(finished=chat_pb2.Finished(**found))
    for result in (results.prediction(chat_pb2.Prediction(**found)), results.event(finished)):
        assert not isinstance(result, Started | Delta)
        assert (result.failovers, result.safety_categories) == (2, ("weapons",))


@given(st.data())
def test_interleaved_answers_come_one_after_the_other_and_whole(data: st.DataObject) -> None:
    answers: list[list[Event]] = [
        [
            Started(0, choice, 1, choice, 0, "", Determinism.UNSPECIFIED),
            *(Delta(0, choice, str(number), ()) for number in range(data.draw(st.integers(0, 4)))),
            Finished(0, choice, FinishReason.STOP, (), USAGE, failovers=0),
        ]
        for choice in range(data.draw(st.integers(1, 4)))
    ]
    turns = [choice for choice, answer in enumerate(answers) for _ in answer]
    queues = [iter(answer) for answer in answers]
    interleaved = [next(queues[choice]) for choice in data.draw(st.permutations(turns))]

    assert list(in_turn(iter(interleaved))) == [event for answer in answers for event in answer]


@pytest.mark.parametrize("command", [("complete", "Once upon"), ("chat", "--ask", "Hello")])
def test_n_prints_answers_one_after_the_other_with_their_seeds(
    run: Run, target: str, command: tuple[str, ...]
) -> None:
    flags = ("--target", target, "--temperature=1.2", "--max_gen_len=8")
    three = run(*command, *flags, "--seed=7", "--n=3")
    alone = [run(*command, *flags, f"--seed={7 + i}").stdout for i in range(3)]

    notes = [line for line in three.stderr.splitlines() if line.startswith("(answer")]
    assert three.returncode == 0, three.stderr
    assert three.stdout == "".join(alone)
    assert notes == [f"(answer {i + 1} of 3, seed {7 + i})" for i in range(3)]


def test_a_conversation_takes_no_n(run: Run, target: str) -> None:
    done = run("chat", "--target", target, "--n=2", stdin="Hello\n")

    assert done.returncode == 2
    assert "--n needs --ask" in done.stderr


def test_a_stop_token_given_to_the_command_ends_the_answer(run: Run, target: str) -> None:
    with Client(target) as client:
        whole = client.complete("Once", temperature=0, max_gen_len=8, logprobs=True)
    stop = str(whole.tokens[3].id)
    first = next(i for i, token in enumerate(whole.tokens) if str(token.id) == stop)

    flags = ("--temperature=0", "--max_gen_len=8", "--stop_token_ids=1", "--stop_token_ids", stop)
    done = run("complete", "--target", target, *flags, "Once")

    kept = b"".join(token.bytes for token in whole.tokens[:first])
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == kept.decode(errors="replace").rstrip("\n")
