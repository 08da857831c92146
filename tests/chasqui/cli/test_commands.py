"""The `chasqui` command as its users run it: processes, pipes, signals."""

import json
import os
import signal
import socket
import subprocess
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.command import CHASQUI
from tests.scripted_gateway import Scripted, StartGateway

Run = Callable[..., "subprocess.CompletedProcess[str]"]
GREEDY = ("--temperature", "0", "--max_gen_len", "8")


def test_ask_prints_the_answer_and_nothing_else(run: Run, target: str) -> None:
    first = run("chat", "--target", target, *GREEDY, "--ask", "Hello")
    again = run("chat", "--target", target, *GREEDY, "--ask", "Hello")

    assert first.returncode == 0
    assert first.stdout.strip()
    assert first.stdout == again.stdout


def test_a_piped_conversation_is_answered_line_by_line(
    run: Run, target: str, tmp_path: Path
) -> None:
    saved = tmp_path / "dialog.json"
    lines = ["/system Be brief.", "Hello", "", "Who are you?", f"/save {saved}", "/quit", "unread"]

    done = run("chat", "--target", target, *GREEDY, stdin="\n".join(lines))

    dialog = json.loads(saved.read_text())
    assert done.returncode == 0, done.stderr
    assert [message["role"] for message in dialog] == [
        "system",
        *("user", "assistant", "user", "assistant"),
    ]
    assert [dialog[0]["content"], dialog[3]["content"]] == ["Be brief.", "Who are you?"]


def test_reset_forgets_the_conversation(run: Run, target: str) -> None:
    alone = run("chat", "--target", target, *GREEDY, stdin="Hello\n")
    after_reset = run("chat", "--target", target, *GREEDY, stdin="Who?\n/reset\nHello\n")

    assert after_reset.returncode == 0
    assert after_reset.stdout.endswith(alone.stdout)


def test_logprobs_are_shown_while_they_are_on(run: Run, target: str) -> None:
    done = run("chat", "--target", target, *GREEDY, stdin="/logprobs\nHello\n/logprobs\nHello\n")

    shown = [line for line in done.stdout.splitlines() if "%" in line]
    assert len(shown) == 8
    assert "logprobs on" in done.stderr
    assert "logprobs off" in done.stderr


def test_a_conversation_that_outgrows_the_context_says_what_was_dropped(
    run: Run, target: str
) -> None:
    question = "What do llamas eat in the high Andes? " * 3

    done = run("chat", "--target", target, *GREEDY, stdin=f"{question}\n" * 6)

    assert done.returncode == 0, done.stderr
    assert "(the oldest 1 turn does not fit the model's context any more)" in done.stderr


def test_a_question_with_special_tags_is_refused_and_forgotten(run: Run, target: str) -> None:
    done = run("chat", "--target", target, *GREEDY, stdin="[INST] hi\nHello\n")

    refusal, _, rest = done.stdout.partition("\n")
    assert refusal == "Error: special tags are not allowed as part of the prompt."
    assert "Error:" not in rest


def test_unknown_commands_are_named(run: Run, target: str) -> None:
    done = run("chat", "--target", target, stdin="/nothing\n")

    assert (done.returncode, done.stdout) == (0, "")
    assert "there is no command /nothing; /help lists the commands" in done.stderr


def test_complete_streams_the_continuation(run: Run, target: str) -> None:
    plain = run("complete", "--target", target, *GREEDY, "Once upon")
    echoed = run("complete", "--target", target, *GREEDY, "--echo", "Once upon")

    assert plain.returncode == echoed.returncode == 0
    assert echoed.stdout == "Once upon" + plain.stdout


def test_wrong_values_are_one_readable_line(run: Run, target: str) -> None:
    done = run("complete", "--target", target, "--temperature=-1", "Once")

    assert done.returncode == 1
    assert done.stderr == "Error: sampling.temperature: must be 0 to 100, not -1\n"


def test_priority_and_no_time_limit_are_flags_of_chat_and_complete(run: Run, target: str) -> None:
    flags = ("--target", target, "--max_gen_len=1", "--priority=-3", "--timeout=inf")
    for command in (("chat", "--ask", "Hello"), ("complete", "Once")):
        assert run(*command, *flags).returncode == 0
        refused = run(*command, *flags, "--priority=101")
        assert refused.stderr == "Error: priority: must be -100 to 100, not 101\n"
        nothing = run(*command, *flags, "--timeout=nan")
        assert nothing.stderr == "Error: timeout: must be a number of seconds, 0 or more, not nan\n"


@pytest.mark.parametrize("command", [("chat", "--ask", "Hello"), ("complete", "Hello")])
def test_a_model_that_is_not_served_is_an_error(
    run: Run, target: str, command: tuple[str, ...]
) -> None:
    flags = ("--target", target, "--max_gen_len=1")
    assert run(*command, *flags, "--model=gqa-mp1").returncode == 0
    refused = run(*command, *flags, "--model=other")
    assert refused.stderr == "Error: model: 'other' is not served here, 'gqa-mp1' is\n"


@pytest.mark.parametrize("command", [("chat", "--ask", "Hello"), ("complete", "Hello"), ("bench",)])
def test_nothing_at_the_target_says_what_to_do(run: Run, command: tuple[str, ...]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"

        done = run(*command, "--target", target)

    assert done.returncode == 1
    assert done.stderr == (
        f"Error: nothing answers at {target} (Connection refused). "
        "Start the services with `chasqui serve`, or name another address with --target.\n"
    )


@pytest.mark.parametrize(
    "command",
    [
        ("complete", "Once", "--target"),
        ("chat", "--ask", "Hello", "--target"),
        ("status", "--target"),
        ("status", "--watch", "--target"),
        ("bench", "--requests=1", "--answer_tokens=1", "--target"),
        ("keys", "new", "--name"),
        ("--help",),
    ],
)
def test_a_reader_that_has_enough_ends_the_command_without_a_word(
    spawn: Callable[..., Any], target: str, command: tuple[str, ...]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = (*command, target) if command[-1] == "--target" else (*command, "ada")
    with spawn(*arguments, stdout=writing) as process:
        os.close(writing)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "")


def test_closed_standard_input_is_wrong_usage(target: str) -> None:
    command = f"{CHASQUI} chat --target {target} <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no standard input to read questions from: use --ask" in done.stderr


def test_words_are_kept_whole_on_a_terminal(
    spawn: Callable[..., Any], start_gateway: StartGateway
) -> None:
    terminal, inside = os.openpty()
    termios.tcsetwinsize(inside, (24, 20))
    gateway = Scripted(["Llamas can carry", " loa", "ds."])
    target = start_gateway(ChatCompleteStream=gateway.stream)
    with spawn("chat", "--target", target, "--ask", "Hello", stdout=inside) as process:
        assert process.wait(timeout=60) == 0
    shown = os.read(terminal, 4096).decode()
    os.close(terminal)
    os.close(inside)
    # The word that did not fit was taken back, and its place filled up.
    assert shown == "Llamas can carry lo\x1b[2D   loads.\r\n"


def test_text_that_is_not_valid_is_refused_by_its_field(run: Run, target: str) -> None:
    done = run("complete", "--target", target, os.fsdecode(b"caf\xe9"))

    assert done.returncode == 1
    assert done.stderr.startswith("Error: prompts[0]: holds a lone surrogate (U+DCE9 at")


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    spawn: Callable[..., Any], unfinished: Any
) -> None:
    with spawn("chat", "--target", unfinished.target) as process:
        process.stdin.write("Hello\n")
        process.stdin.flush()
        assert process.stdout.read(4) == "word"

        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate("/help\n", timeout=30)

    assert process.returncode == 0
    assert "(stopped)" in stderr
    assert "/reset" in stderr
    assert unfinished.cancelled.is_set()
    assert unfinished.cancelled_names == unfinished.names


def test_ctrl_c_at_the_prompt_leaves(spawn: Callable[..., Any], target: str) -> None:
    terminal, inside = os.openpty()
    with spawn("chat", "--target", target, stdin=inside, stdout=inside, stderr=inside) as process:
        shown = b""
        while not shown.endswith(b"> "):
            shown += os.read(terminal, 1024)

        process.send_signal(signal.SIGINT)
        # readline does not see a signal that comes between its prompt and its wait for a key.
        os.write(terminal, b"\n")

        assert process.wait(timeout=30) == 0
    os.close(terminal)
    os.close(inside)
    assert b"gqa-mp1: 0.2M parameters, float32, 1 shard, context of 256 tokens" in shown


def test_ctrl_d_at_the_prompt_leaves_with_a_line_of_its_own_for_the_shell(
    spawn: Callable[..., Any], target: str
) -> None:
    terminal, inside = os.openpty()
    with spawn("chat", "--target", target, stdin=inside, stdout=inside, stderr=inside) as process:
        os.close(inside)
        shown = b""
        while not shown.endswith(b"> "):
            shown += os.read(terminal, 1024)
        os.write(terminal, b"\x04")
        shown = b""
        with suppress(OSError):  # at the end, as nothing has the terminal open any more
            while data := os.read(terminal, 1024):
                shown += data

        assert process.wait(timeout=30) == 0
    os.close(terminal)
    assert shown.endswith(b"\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("chat", "--no_such_flag"), "No such option"),
        (("serve", "--shards", "0"), "0 is not in the range"),
        (("chat", "--ckpt_dir", "."), "--ckpt_dir needs --serve"),
    ],
)
def test_wrong_usage_has_its_own_status(
    run: Run, arguments: tuple[str, ...], complaint: str
) -> None:
    done = run(*arguments)

    assert done.returncode == 2
    assert complaint in done.stderr


def test_help_lists_flags_with_their_variables(run: Run) -> None:
    shown = run("serve", "--help").stdout

    for name in ("ckpt_dir", "tokenizer_path", "max_seq_len", "max_batch_size", "shards"):
        assert f"--{name} " in shown
        assert f"CHASQUI_{name.upper()}" in shown
