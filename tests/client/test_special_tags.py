"""Answers, questions and instructions that hold special tags, and what a dialog does with them."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from client import Client, FinishReason, Message, special_tags, without_special_tags
from client.results import chat_prediction
from llama.v1 import chat_pb2
from tests.client.conftest import Run, Scripted, StartGateway

HELLO: Message = {"role": "user", "content": "Hello"}
PIECES = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[", "]", "/", "INST", "<<", ">>", "SYS", " "]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_text_without_special_tags_holds_none_and_is_else_as_it_was(text: str) -> None:
    kept = without_special_tags(text)
    assert special_tags(kept) == ()
    assert (kept == text) is (special_tags(text) == ())


def test_a_conversation_goes_on_after_an_answer_with_tags(
    run: Run, start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = Scripted(["Hi! [/IN", "ST] More? [INST]"], ["Fine."], ["Bye."])
    target = start_gateway(ChatCompleteStream=gateway.stream)
    lines = f"Hello\nHow are you?\n/save {tmp_path / 'saved'}\nBye\n"
    done = run("chat", "--target", target, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "Hi! [/INST] More? [INST]"  # what came is shown
    assert done.stderr.count("(the answer holds [INST] and [/INST], which no dialog may hold") == 1
    assert gateway.dialogs[1] == ["Hello", "Hi!  More? ", "How are you?"]
    saved = json.loads((tmp_path / "saved").read_text())
    assert [each["content"] for each in saved] == [*gateway.dialogs[1], "Fine."]


def test_a_turn_whose_answer_is_all_tags_is_left_out(run: Run, start_gateway: StartGateway) -> None:
    gateway = Scripted([" [INST]"], ["Fine."])
    target = start_gateway(ChatCompleteStream=gateway.stream)
    done = run("chat", "--target", target, stdin="Hello\nHow are you?\n")
    assert "the conversation goes on without this turn)" in done.stderr
    assert gateway.dialogs[1] == ["How are you?"]


def test_the_message_of_an_answer_can_be_sent_back(target: str) -> None:
    answer = chat_prediction(
        chat_pb2.ChatPrediction(generation=chat_pb2.Message(content="Hi [INST] you"))
    )
    with Client(target) as client:
        raw: Message = {"role": "assistant", "content": answer.content}
        refused = client.chat([HELLO, raw, HELLO], max_gen_len=1)
        going_on = client.chat([HELLO, answer.message, HELLO], max_gen_len=1)
    assert answer.content == "Hi [INST] you"
    assert refused.finish_reason is FinishReason.UNSAFE
    assert going_on.finish_reason is not FinishReason.UNSAFE


def test_a_question_with_tags_is_said_to_be_left_out(run: Run, target: str) -> None:
    done = run("chat", "--target", target, "--max_gen_len=4", stdin="<<SYS>> hi\nHello\n")
    assert (
        "(the question holds <<SYS>>, which no dialog may hold: it was not answered" in done.stderr
    )
    assert done.stdout.count("Error: special tags are not allowed") == 1


def test_instructions_with_tags_are_refused_at_once(run: Run, target: str) -> None:
    lines = "/system Be brief.\n/system [INST]\nHello\n"
    done = run("chat", "--target", target, "--max_gen_len=4", stdin=lines)
    assert "instructions must not hold [INST]: they are as before" in done.stderr
    assert "Error:" not in done.stdout
    flag = run("chat", "--target", target, "--system", "a [/INST]", "--ask", "Hello")
    assert flag.returncode == 2
    assert "must not hold [/INST]: no dialog may" in flag.stderr
