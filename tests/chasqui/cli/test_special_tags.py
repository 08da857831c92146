"""Answers, questions and instructions that hold special tags, and what a dialog does with them."""

import json
from pathlib import Path

from llama.v1 import chat_pb2
from tests.command import Run
from tests.scripted_gateway import Scripted, StartGateway


def test_a_conversation_goes_on_after_an_answer_with_tags(
    run: Run, start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = Scripted(["Hi! [/IN", "ST] More? [INST]"], ["Fine."], ["Bye."])
    target = start_gateway(ChatCompleteStream=gateway.stream)
    lines = f"Hello\nHow are you?\n/save {tmp_path / 'saved'}\nBye\n"
    done = run("chat", "--target", target, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "Hi! [/INST] More? [INST]"  # what came is shown
    assert done.stderr.count("(the answer contains [INST] and [/INST], which") == 1
    assert gateway.dialogs[1] == ["Hello", "Hi!  More? ", "How are you?"]
    saved = json.loads((tmp_path / "saved").read_text())
    assert [each["content"] for each in saved] == [*gateway.dialogs[1], "Fine."]


def test_a_turn_whose_answer_is_all_tags_is_left_out(run: Run, start_gateway: StartGateway) -> None:
    gateway = Scripted([" [INST]"], ["Fine."])
    target = start_gateway(ChatCompleteStream=gateway.stream)
    done = run("chat", "--target", target, stdin="Hello\nHow are you?\n")
    assert "the conversation continues without this turn)" in done.stderr
    assert gateway.dialogs[1] == ["How are you?"]


def test_a_question_with_tags_is_said_to_be_left_out(run: Run, target: str) -> None:
    done = run("chat", "--target", target, "--max_gen_len=4", stdin="<<SYS>> hi\nHello\n")
    assert (
        "(the question contains <<SYS>>, which no dialog may contain: it was not answered"
        in done.stderr
    )
    assert done.stdout.count("Error: special tags are not allowed") == 1


def test_instructions_with_tags_are_refused_at_once(run: Run, target: str) -> None:
    lines = "/system Be brief.\n/system [INST]\nHello\n"
    done = run("chat", "--target", target, "--max_gen_len=4", stdin=lines)
    assert "instructions must not contain [INST]: they are unchanged" in done.stderr
    assert "Error:" not in done.stdout
    flag = run("chat", "--target", target, "--system", "a [/INST]", "--ask", "Hello")
    assert flag.returncode == 2
    assert "must not contain [/INST], which no dialog may" in flag.stderr


def test_tags_are_those_of_the_served_models_format(run: Run, start_gateway: StartGateway) -> None:
    prompt_format = chat_pb2.PromptFormat(name="zephyr", special_tags=["<|user|>"])
    gateway = Scripted(["[INST] <|user|>Hi"], ["Bye."], prompt_format=prompt_format)
    served = chat_pb2.GetModelResponse(prompt_format=prompt_format)
    target = start_gateway(ChatCompleteStream=gateway.stream, GetModel=lambda *_: served)
    lines = "/system Never write [INST]\n/system <|user|>\nHello\nBye\n"
    done = run("chat", "--target", target, stdin=lines)
    assert "instructions must not contain <|user|>: they are unchanged" in done.stderr
    assert "(the answer contains <|user|>, which no dialog may contain" in done.stderr
    assert gateway.dialogs[1] == ["Never write [INST]", "Hello", "[INST] Hi", "Bye"]
