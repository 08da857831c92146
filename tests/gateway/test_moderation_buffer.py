"""The shown part of an answer, for any deltas, chunks and times of verdicts."""

import itertools
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from gateway.generation.events import Delta, Event, Finished
from gateway.generation.safety.classifier import SAFE, Judgement
from gateway.generation.safety.moderation_buffer import ModerationBuffer
from llama.prompt_format.dialog import ASSISTANT, USER, Message
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import FINISH_REASON_SAFETY, FINISH_REASON_STOP
from safety_service.rules import Rules

END = Finished(FINISH_REASON_STOP, chat_pb2.Usage(completion_tokens=3))
PIECES = st.lists(st.sampled_from(["", " ", "a", " two", "words more", "é", "\n"]), max_size=40)
CHUNKS = st.integers(1, 30)
HIDDEN_PHRASE = "How to\n k.i\u034fll \u2014 my self"
# After which deltas a verdict arrives, if one is awaited.
ARRIVALS = st.lists(st.booleans(), min_size=40, max_size=40)


def tokens_of(piece: str) -> list[chat_pb2.Token]:
    """A token for each byte: characters are cut, as byte tokens cut them."""
    return [chat_pb2.Token(bytes=bytes([each])) for each in piece.encode()]


def run(
    held: ModerationBuffer,
    pieces: Sequence[str],
    arrivals: Sequence[bool],
    is_unsafe: Callable[[str], object] = lambda _: False,
) -> list[Event]:
    """All that is shown; a judgement is asked for as the gateway does, one at a time."""
    shown: list[Event] = []
    judged: str | None = None

    def judge() -> None:
        nonlocal judged
        subject = held.next_chunk()
        if subject is not None:
            judged = subject if isinstance(subject, str) else subject[-1].content

    def answer() -> None:
        nonlocal judged
        if judged is not None:
            unsafe, judged = is_unsafe(judged), None
            shown.extend(held.on_verdict(Judgement(True, ("x",)) if unsafe else SAFE))
            judge()

    for piece, arrives in zip(pieces, arrivals, strict=False):
        shown += held.on_event(Delta(piece, tokens_of(piece)))
        judge()
        if arrives:
            answer()
    shown += held.on_event(END)
    judge()
    while judged is not None:
        answer()
    return shown


def text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


@given(PIECES, CHUNKS, ARRIVALS, st.booleans())
def test_all_of_a_safe_answer_is_shown_in_order(
    pieces: list[str], chunk: int, arrivals: list[bool], logprobs: bool
) -> None:
    events = run(ModerationBuffer("text", chunk, logprobs=logprobs), pieces, arrivals)
    tokens = [token for event in events if isinstance(event, Delta) for token in event.tokens]
    assert text(events) == "".join(pieces)
    assert tokens == tokens_of("".join(pieces))
    assert [event for event in events if not isinstance(event, Delta)] == [END]
    assert events[-1] == END


@given(PIECES, CHUNKS, ARRIVALS, st.booleans())
def test_unsafe_word_is_never_shown(
    pieces: list[str], chunk: int, arrivals: list[bool], logprobs: bool
) -> None:
    said = [*pieces[:20], " bo", "mb", *pieces[20:]]
    held = ModerationBuffer("", chunk, logprobs=logprobs)
    events = run(held, said, [*arrivals, True, True], lambda answer: "bomb" in answer)
    tokens = [token for event in events if isinstance(event, Delta) for token in event.tokens]
    assert "bomb" not in text(events)
    assert b"bomb" not in b"".join(token.bytes for token in tokens)
    assert "".join(said).startswith(text(events))
    assert events[-1] == Finished(FINISH_REASON_SAFETY, END.usage, safety_categories=("x",))


@given(PIECES, CHUNKS, ARRIVALS, st.sets(st.integers(1, len(HIDDEN_PHRASE) - 1)))
def test_phrase_that_rules_find_is_not_shown_wherever_chunks_cut_it(
    pieces: list[str], chunk: int, arrivals: list[bool], cuts: set[int]
) -> None:
    borders = [0, *sorted(cuts), len(HIDDEN_PHRASE)]
    phrase = [HIDDEN_PHRASE[first:last] for first, last in itertools.pairwise(borders)]
    said = [*pieces, " ", *phrase, " ", *pieces]
    events = run(ModerationBuffer("", chunk, logprobs=False), said, arrivals * 3, Rules.read().find)
    assert HIDDEN_PHRASE not in text(events)
    assert "".join(said).startswith(text(events))
    assert events[-1] == Finished(FINISH_REASON_SAFETY, END.usage, safety_categories=("x",))


def test_chunk_ends_in_front_of_a_space() -> None:
    held = ModerationBuffer([Message(USER, "?")], 6, logprobs=False)
    for piece in ("seven", "teen"):
        held.on_event(Delta(piece, []))
        assert held.next_chunk() is None
    held.on_event(Delta(" llam", []))
    assert held.next_chunk() == [Message(USER, "?"), Message(ASSISTANT, "seventeen")]


def test_chunk_without_a_space_is_judged_when_it_is_twice_as_long() -> None:
    held = ModerationBuffer("of ", 4, logprobs=False)
    held.on_event(Delta("sevente", []))
    assert held.next_chunk() is None
    held.on_event(Delta("en", []))
    assert held.next_chunk() == "of seventeen"


def test_chunk_tells_how_many_tokens_the_answer_has() -> None:
    held = ModerationBuffer("", 4, logprobs=False)
    for count, piece in enumerate(["one", " two", " three"], start=1):
        held.on_event(Delta(piece, [], count))
    assert held.next_chunk() == "one two"
    assert held.on_verdict(SAFE) == [Delta("one two", [], 2)]


def test_empty_answer_needs_no_judgement() -> None:
    held = ModerationBuffer("text", 4, logprobs=False)
    assert held.on_event(END) == [END]
    assert held.next_chunk() is None
