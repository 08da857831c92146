"""Answers, questions and instructions that hold special tags, and what a dialog does with them."""

from hypothesis import given
from hypothesis import strategies as st

from client import Client, FinishReason, Message, special_tags, without_special_tags
from client.results import predictions
from llama.v1 import chat_pb2

HELLO: Message = {"role": "user", "content": "Hello"}
PIECES = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[", "]", "/", "INST", "<<", ">>", "SYS", " "]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_text_without_special_tags_holds_none_and_is_else_as_it_was(text: str) -> None:
    kept = without_special_tags(text)
    assert special_tags(kept) == ()
    assert (kept == text) is (special_tags(text) == ())


def test_the_message_of_an_answer_can_be_sent_back(target: str) -> None:
    made = chat_pb2.Prediction(text="Hi [INST] you")
    [answer] = predictions(chat_pb2.ChatCompleteResponse(predictions=[made]))
    with Client(target) as client:
        raw: Message = {"role": "assistant", "content": answer.text}
        refused = client.chat([HELLO, raw, HELLO], max_gen_len=1)
        going_on = client.chat([HELLO, answer.message, HELLO], max_gen_len=1)
    assert answer.text == "Hi [INST] you"
    assert refused.finish_reason is FinishReason.SPECIAL_TAGS
    assert going_on.finish_reason is not FinishReason.SPECIAL_TAGS


def test_the_tags_are_those_of_the_models_prompt_format() -> None:
    prompt_format = chat_pb2.PromptFormat(name="zephyr", special_tags=["<|user|>"])
    made = chat_pb2.Prediction(text="Hi [INST] <|user|>you", prompt_format=prompt_format)
    [answer] = predictions(chat_pb2.ChatCompleteResponse(predictions=[made]))
    assert answer.message["content"] == "Hi [INST] you"
    none = chat_pb2.Prediction(text="[INST]", prompt_format=chat_pb2.PromptFormat(name="chatml"))
    [answer] = predictions(chat_pb2.ChatCompleteResponse(predictions=[none]))
    assert answer.message["content"] == "[INST]"


def test_the_served_model_names_its_format_and_tags(target: str) -> None:
    with Client(target) as client:
        model = client.get_model()
        answer = client.chat([HELLO], max_gen_len=1)
    assert model.prompt_format == "llama2"
    assert model.special_tags == answer.special_tags == ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
