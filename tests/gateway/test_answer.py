"""The text and tokens of one generation, event by event."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.generation.answer import Answer
from gateway.request.options import Options
from gateway.text.stop_strings import StopString
from gateway.text.vocabulary import Vocabulary
from llama.v1.model_pb2 import TokenEvent, TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_LENGTH, SamplingParams
from tokenizer_service.tokenizer import Tokenizer


def start(vocabulary: Vocabulary, prompt_ids: list[int], stop: str = "", **fields: Any) -> Answer:
    stops = (StopString.compile(stop),) if stop else ()
    chosen = {"logprobs": False, "top_logprobs": 0, "echo": False, **fields}
    return Answer(prompt_ids, Options(SamplingParams(), stops, **chosen), vocabulary)


@pytest.fixture
def ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("The llama is here, the llama is there", bos=False, eos=False)


def test_stop_string_ends_text_tokens_and_count(vocabulary: Vocabulary, ids: list[int]) -> None:
    answer = start(vocabulary, [1], stop=" here", logprobs=True)
    delta = answer.append_event(TokenEvent(ids=ids, logprobs=[-1.0] * len(ids)))
    later = answer.append_event(TokenEvent(ids=ids, finish_reason=FINISH_REASON_LENGTH))
    assert (delta.text, later.text, later.tokens) == ("The llama is", "", [])
    assert answer.stopped
    assert answer.completion_tokens == len(delta.tokens) < len(ids)


def test_tokens_are_told_at_once_though_their_text_is_held_back(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    answer = start(vocabulary, [1], logprobs=True)
    deltas = [
        answer.append_event(TokenEvent(ids=[3 + byte], logprobs=[-1.0])) for byte in "é".encode()
    ]
    assert [delta.text for delta in deltas] == ["", "é"]
    assert [delta.tokens[0].bytes for delta in deltas] == [b"\xc3", b"\xa9"]


def test_end_tells_what_was_held_back(vocabulary: Vocabulary) -> None:
    answer = start(vocabulary, [1], stop="\ufffd!")
    cut_off = 3 + "é".encode()[0]
    assert answer.append_event(TokenEvent(ids=[cut_off])).text == ""
    assert answer.append_event(TokenEvent(finish_reason=FINISH_REASON_LENGTH)).text == "\ufffd"


def test_prompt_reported_by_the_model_is_neither_counted_nor_searched_for_stop_strings(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("one stop two", bos=True, eos=False)
    more = tokenizer.encode("one stop", bos=False, eos=False)
    answer = start(vocabulary, prompt, stop=" stop", logprobs=True, echo=True)
    made = [*prompt, *more]
    delta = answer.append_event(TokenEvent(ids=made, logprobs=[0.0] * len(made)))
    assert (answer.begin().text, delta.text) == ("", "one stop two one")
    assert answer.completion_tokens == len(more)


def test_echo_without_logprobs_tells_the_prompt_first(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("one", bos=True, eos=False)
    answer = start(vocabulary, prompt, echo=True)
    more = tokenizer.encode("two", bos=False, eos=False)
    assert [answer.begin().text, answer.append_event(TokenEvent(ids=more)).text] == ["one", " two"]


IDS = st.lists(st.integers(0, 559), max_size=8)
BYTE = 3  # the id of byte 0
VALID_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(prompt=IDS, more=IDS, logprobs=st.booleans())
@example(prompt=[1, 393], more=[393], logprobs=False)  # the space in front of a word
@example(prompt=[1, BYTE + 0xE2], more=[BYTE + 0x82, BYTE + 0xAC], logprobs=False)
@example(prompt=[1], more=[393], logprobs=True)  # nothing in front of it, so no space
def test_exact_continuation_is_what_echo_shows_behind_the_prompt(
    vocabulary: Vocabulary, tokenizer: Tokenizer, prompt: list[int], more: list[int], logprobs: bool
) -> None:
    exact = start(vocabulary, prompt, exact_continuation=True, logprobs=logprobs)
    echoed = start(vocabulary, prompt, echo=True)
    end = TokenEvent(finish_reason=FINISH_REASON_LENGTH)
    events = [*(TokenEvent(ids=[each], logprobs=[-1.0]) for each in more), end]
    shown = echoed.begin().text
    assert exact.begin().text == ""
    continuation = "".join(exact.append_event(event).text for event in events)
    assert continuation == "".join(echoed.append_event(event).text for event in events)
    assert shown + continuation == tokenizer.decode([*prompt, *more])


@given(prompt=VALID_TEXT, more=IDS)
def test_a_text_and_its_exact_continuation_can_be_joined(
    vocabulary: Vocabulary, tokenizer: Tokenizer, prompt: str, more: list[int]
) -> None:
    ids = tokenizer.encode(prompt, bos=True, eos=False)
    answer = start(vocabulary, ids, exact_continuation=True)
    answer.begin()
    text = answer.append_event(TokenEvent(ids=more, finish_reason=FINISH_REASON_LENGTH)).text
    # U+2581 is how SentencePiece writes a space: it cannot be told from one.
    assert prompt.replace("\u2581", " ") + text == tokenizer.decode([*ids, *more])


def test_alternatives_get_text_and_bytes(vocabulary: Vocabulary) -> None:
    answer = start(vocabulary, [1], logprobs=True, top_logprobs=2)
    top = TopLogprobs(ids=[393, 172], logprobs=[-0.2, -2])
    [token] = answer.append_event(TokenEvent(ids=[393], logprobs=[-0.2], top=[top])).tokens
    assert [(each.text, each.bytes) for each in token.top_logprobs] == [
        ("car", b" car"),
        ("\ufffd", b"\xa9"),
    ]


def test_first_prompt_token_has_no_alternatives(vocabulary: Vocabulary) -> None:
    answer = start(vocabulary, [1], logprobs=True, top_logprobs=2, echo=True)
    [token] = answer.append_event(TokenEvent(ids=[1], logprobs=[0.0])).tokens
    assert not token.top_logprobs
