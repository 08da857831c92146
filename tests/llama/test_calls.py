"""Calls that end early, and calls of several threads: neither affects the next call."""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from tests.llama.conftest import DIALOG, GOLDEN, TOKENIZER, build, launch, python

PROMPT = [1, 100, 101]


@pytest.fixture
def expected(llama: Llama) -> list[list[int]]:
    return llama.generate([PROMPT], 8, 0.0)[0]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"temperature": math.nan}, "temperature: must be 0 to 100, not nan"),
        ({"temperature": None}, "temperature: must be a number, not None"),
        ({"temperature": "1"}, "temperature: must be a number, not '1'"),
        ({"top_p": -1}, "top_p: must be 0 to 1, not -1"),
        ({"top_p": 1.0000001}, "top_p: must be 0 to 1, not 1.0000001"),
        ({"max_gen_len": -1}, "max_gen_len: must be at least 0, not -1"),
        ({"max_gen_len": 2.5}, "max_gen_len: must be an integer, not 2.5"),
        (
            {"prompt_tokens": [PROMPT, [1, 560]]},
            "prompt_tokens[1][1]: must be less than the vocabulary size, 560, not 560",
        ),
        ({"prompt_tokens": [[1, -1]]}, "prompt_tokens[0][1]: must be at least 0, not -1"),
        ({"prompt_tokens": [[1, "a"]]}, "prompt_tokens[0][1]: must be an integer, not 'a'"),
        ({"prompt_tokens": [[]]}, "prompt_tokens[0]: must not be empty"),
        ({"prompt_tokens": [1]}, "prompt_tokens[0]: must be a list of token ids, not int"),
        ({"prompt_tokens": [b"ab"]}, "prompt_tokens[0]: must be a list of token ids, not bytes"),
        ({"prompt_tokens": None}, "prompt_tokens: must be a list of lists of token ids, not None"),
        (
            {"prompt_tokens": [], "temperature": math.inf, "top_p": 2},
            "temperature: must be 0 to 100, not inf; top_p: must be 0 to 1, not 2",
        ),
    ],
)
def test_a_refused_argument_is_named_and_leaves_nothing_behind(
    llama: Llama, expected: list[list[int]], changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match="must") as refused:
        llama.generate(**{"prompt_tokens": [PROMPT], "max_gen_len": 8, **changes})
    assert str(refused.value) == rule
    assert llama.generate([PROMPT], 8, 0.0)[0] == expected


@pytest.mark.parametrize(
    ("dialogs", "rule"),
    [
        ("hi", "dialogs: must be a list of dialogs, not str"),
        (None, "dialogs: must be a list of dialogs, not None"),
        (DIALOG, "dialogs[0]: must be a list of messages, not dict"),
        ([DIALOG, "hi"], "dialogs[1]: must be a list of messages, not str"),
        ([["hi"]], "dialogs[0].messages[0]: must be a message with role and content, not str"),
        ([[{"content": "hi"}]], "dialogs[0].messages[0].role: is missing"),
        ([[{"role": "user"}]], "dialogs[0].messages[0].content: is missing"),
        (
            [[*DIALOG, {"role": "assistant", "content": ["hay"]}, *DIALOG]],
            "dialogs[0].messages[1].content: must be a text, not list",
        ),
        (
            [[{"role": "user", "content": None}]],
            "dialogs[0].messages[0].content: must be a text, not None",
        ),
        (
            [[{"role": ["user"], "content": "hi"}]],
            "dialogs[0].messages[0].role: must be system, user or assistant",
        ),
        (
            [[{"role": "user", "content": "a\ud800"}]],
            "dialogs[0].messages[0].content: holds a lone surrogate (U+D800 at character 1), "
            "which is not valid unicode",
        ),
    ],
)
def test_what_is_no_dialog_is_refused_with_its_path(llama: Llama, dialogs: Any, rule: str) -> None:
    with pytest.raises(ValueError, match="dialogs") as refused:
        llama.chat_completion(dialogs)
    assert str(refused.value) == rule


@pytest.mark.parametrize("prompts", ["hi", [b"hi"], [None]])
def test_what_is_no_text_is_refused_with_its_path(llama: Llama, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"^prompts(\[0\])?: must be a (list|text)"):
        llama.text_completion(prompts)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("max_batch_size", 0, "Input should be greater than or equal to 1, got 0"),
        ("max_batch_size", -1, "Input should be greater than or equal to 1, got -1"),
        ("max_batch_size", 1025, "Input should be less than or equal to 1024, got 1025"),
        ("max_seq_len", -1, "Input should be greater than or equal to 2, got -1"),
        ("max_seq_len", 0, "Input should be greater than or equal to 2, got 0"),
        ("max_seq_len", 2**25, "Input should be less than or equal to 16777216, got 33554432"),
        ("max_seq_len", None, "Input should be a valid integer, got None"),
    ],
)
def test_sizes_have_the_ranges_of_the_model_services_settings(
    option: str, value: Any, rule: str
) -> None:
    with pytest.raises(ValueError, match=option) as refused:
        build("no such checkpoint", **{option: value})
    assert str(refused.value) == f"{option}: {rule}"


def test_a_step_that_fails_ends_its_call_alone(
    llama: Llama, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llama._rank._replica.runner
    execute: Callable[..., torch.Tensor] = runner.execute

    def execute_once(plan: Any) -> torch.Tensor:
        monkeypatch.setattr(runner, "execute", fail)
        return execute(plan)

    def fail(plan: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "execute", execute_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        llama.generate([PROMPT] * 9, 8)
    monkeypatch.undo()
    assert llama.generate([PROMPT], 8, 0.0)[0] == expected


def test_calls_of_several_threads_take_turns_and_lose_nothing(llama: Llama) -> None:
    prompts = [[1, 100 + index] for index in range(12)]
    alone = [llama.generate([prompt], 12, 0.0) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        together = [*threads.map(lambda prompt: llama.generate([prompt], 12, 0.0), prompts)]
    assert together == alone


INTERRUPTED = """
import _thread, json, os, signal, sys, threading, time
from pathlib import Path
from llama import Llama

folder, checkpoint, tokenizer, *interrupts = sys.argv[1:]
rank = int(os.environ.get("RANK", "0"))
llama = Llama.build(checkpoint, tokenizer, max_seq_len=256, max_batch_size=4)
engine = llama._rank._engine

def interrupt(running, before, how):
    while engine and engine.load().steps < before + 3:
        time.sleep(0.001)
    if engine:
        running.touch()
    while not running.exists():
        time.sleep(0.001)
    if how == "main":
        _thread.interrupt_main()
    elif str(rank) in how:
        os.kill(os.getpid(), signal.SIGINT)

def settle(thread):
    # The interrupt may come after the call: rank 0 tells the others of its own.
    while True:
        try:
            thread.join()
            time.sleep(0)  # runs the handler of a signal that has come
            return
        except KeyboardInterrupt:
            pass

outcomes = []
for number, how in enumerate(interrupts):
    running = Path(folder, f"running-{number}")
    before = engine.load().steps if engine else 0
    thread = threading.Thread(target=interrupt, args=(running, before, how))
    thread.start()
    outcome = "complete"
    try:
        llama.generate([[1, 100 + index] for index in range(6)], 60, 1.0, 1.0)
        thread.join()
    except KeyboardInterrupt:
        outcome = "interrupted"
    settle(thread)
    outcomes.append([outcome, llama.generate([[1, 100, 101]], 8, 0.0)[0]])
    if engine:
        load = engine.load()
        assert load.running_sequences == load.waiting_sequences == 0
        assert load.free_blocks == load.total_blocks
Path(folder, f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
"""


@pytest.mark.parametrize(
    ("checkpoint", "interrupts"),
    [
        ("gqa-mp1", {"0": ["interrupted"], "main": ["interrupted"]}),
        (
            "gqa-mp2",
            {
                "0": ["interrupted"] * 2,
                "1": ["complete", "interrupted"],
                "01": ["interrupted"] * 2,
            },
        ),
    ],
)
def test_after_ctrl_c_in_a_call_the_next_one_works_on_every_rank(
    tmp_path: Path,
    expected: list[list[int]],
    checkpoint: str,
    interrupts: dict[str, list[str]],
) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    ranks = len(interrupts["0"])
    command = [script, tmp_path, GOLDEN / "checkpoints" / checkpoint, TOKENIZER, *interrupts]
    python(*command) if ranks == 1 else launch(ranks, *command)
    for rank in range(ranks):
        outcomes = json.loads((tmp_path / f"outcomes-{rank}.json").read_text())
        assert outcomes == [[each[rank], expected] for each in interrupts.values()]
