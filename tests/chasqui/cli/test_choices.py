"""Several answers to one dialog or prompt, as the command prints them."""

import subprocess
from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chasqui.cli.chat import in_turn
from client import Client, Delta, Event, Finished, FinishReason, Started
from client.results import Determinism, Usage

Run = Callable[..., "subprocess.CompletedProcess[str]"]
USAGE = Usage(1, 0, 1, *[timedelta()] * 5)


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
