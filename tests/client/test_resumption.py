"""Streams whose connection breaks, without a network."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import (
    ChasquiError,
    DeadlineExceededError,
    Delta,
    Event,
    StreamLostError,
    UnavailableError,
    UnreachableError,
)
from client.resumption import ResumableStream
from llama.v1 import chat_pb2
from llama.v1.chat_pb2 import (
    ResumeStreamRequest,
    ResumeStreamResponse,
    StreamEvent,
    TextCompleteStreamRequest,
    TextCompleteStreamResponse,
    Token,
)
from llama.v1.sampling_pb2 import SamplingParams

ANSWER = "Chasquis ran by day and by night."
BROKEN = UnreachableError("the connection broke", request_id="abc")
REFUSED = UnreachableError("nothing answers")
UNKNOWN = ChasquiError("there is no stream", grpc.StatusCode.NOT_FOUND, "abc")


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Reader:
    """Reads one stream."""

    prompts: Sequence[str] = ("Once",)
    timeout: float | None = None
    clock: Clock = field(default_factory=Clock)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        request = TextCompleteStreamRequest(prompts=self.prompts)
        self.stream = ResumableStream(request, self.timeout, 30.0, self.clock)
        self.request = self.stream.next_request()

    def append(self, response: TextCompleteStreamResponse) -> None:
        event = self.stream.on_response(response)
        self.events += [] if event is None else [event]

    def fails(self, error: ChasquiError) -> float:
        pause = self.stream.pause_after(error)
        self.clock.now += pause
        self.request = self.stream.next_request()
        return pause


def run_of(
    pieces: Sequence[str], fingerprint: str = "f", seed: int = 7
) -> Iterator[TextCompleteStreamResponse]:
    """One run of the stream: a token per character, an event per piece."""
    events = [
        StreamEvent(
            started=chat_pb2.Started(sampling=SamplingParams(seed=seed), fingerprint=fingerprint)
        )
    ]
    for piece in pieces:
        tokens = [Token(id=ord(character)) for character in piece]
        events.append(StreamEvent(delta=chat_pb2.Delta(text=piece, tokens=tokens)))
    events.append(StreamEvent(finished=chat_pb2.Finished()))
    for number, event in enumerate(events, start=1):
        event.event_number = number
        yield TextCompleteStreamResponse(event=event)


def repeated(reader: Reader, responses: Iterator[TextCompleteStreamResponse]) -> None:
    """Reads up to the middle, loses the gateway, and reads what the next one makes."""
    for response in [*run_of(["Chasquis ", "ran by day"])][:3]:
        reader.append(response)
    reader.fails(BROKEN)
    reader.fails(UNKNOWN)
    for response in responses:
        reader.append(response)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[list[str], list[int]]]:
    """Runs of one stream: how each cuts the answer into events, and where connections break."""
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        cuts = sorted({0, len(ANSWER), *draw(st.lists(st.integers(0, len(ANSWER))))})
        pieces = [ANSWER[a:b] for a, b in pairwise(cuts)]
        breaks = draw(st.lists(st.integers(0, len(pieces) + 1), max_size=3))
        drawn.append((pieces, breaks))
    return drawn


@given(runs())
def test_any_pattern_of_breaks_and_restarts_delivers_each_token_once(
    drawn: list[tuple[list[str], list[int]]],
) -> None:
    reader = Reader()
    for number, (pieces, breaks) in enumerate(drawn):
        responses = [*run_of(pieces)]
        for position, response in enumerate(responses):
            if position in breaks and position:
                reader.fails(BROKEN)
                assert reader.request == ResumeStreamRequest(
                    stream_name=reader.stream.name, after_event_number=position
                )
            if position == len(responses) - 1 and number < len(drawn) - 1:
                reader.fails(UNKNOWN)
                break
            reader.append(response)
    deltas = [event for event in reader.events if isinstance(event, Delta)]
    assert "".join(event.text for event in deltas) == ANSWER
    assert "".join(chr(token.id) for event in deltas for token in event.tokens) == ANSWER
    assert len(reader.events) == len(deltas) + 2


def test_repeated_stream_has_the_reported_seed_and_a_new_name() -> None:
    reader = Reader()
    before = reader.stream.name
    repeated(reader, run_of([ANSWER]))
    assert isinstance(reader.request, TextCompleteStreamRequest)
    assert reader.request.sampling.seed == 7
    assert reader.request.stream_name not in ("", before)


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        (run_of([ANSWER], fingerprint="g"), "serves another model now: fingerprint g, .* was f"),
        (run_of(["Chasquis walked"]), "came out differently"),
        (run_of(["Chasquis"]), "came out shorter"),
    ],
)
def test_answer_that_is_not_repeated_exactly_is_an_error(
    responses: Iterator[TextCompleteStreamResponse], reason: str
) -> None:
    reader = Reader()
    with pytest.raises(StreamLostError, match=f"lost after 3 events: .*{reason}") as lost:
        repeated(reader, responses)
    assert lost.value.events == 3
    assert reader.stream.wants_cancel


def test_each_lost_connection_is_reported_once_with_the_time_that_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader, responses = Reader(timeout=20.0), run_of(["Chasquis ", "ran"])
    for _ in range(2):
        reader.append(next(responses))
        reader.fails(BROKEN)
        reader.fails(REFUSED)
        reader.clock.now += 4.7
    tries = [
        f"the connection broke; trying for up to {left} seconds to continue the answer"
        for left in ("20", "15")
    ]
    assert caplog.record_tuples == [("chasqui", logging.WARNING, each) for each in tries]


def test_several_prompts_without_a_seed_are_not_repeated() -> None:
    with pytest.raises(StreamLostError, match="can only be repeated if the request has a seed"):
        repeated(Reader(prompts=("One", "Two")), run_of([ANSWER]))


def test_event_that_is_missing_is_an_error() -> None:
    started, _, finished = run_of([ANSWER])
    reader = Reader()
    reader.append(started)
    with pytest.raises(StreamLostError, match="event 3 came after event 1"):
        reader.append(finished)


def test_pauses_grow_until_the_stream_is_given_up() -> None:
    reader = Reader()
    reader.append(next(run_of([ANSWER])))
    pauses: list[float] = []
    with pytest.raises(StreamLostError, match="could not be resumed within 30 seconds"):
        pauses.extend(iter(lambda: reader.fails(REFUSED), None))
    assert pauses[:5] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0])
    assert sum(pauses) == pytest.approx(30, abs=1)


def test_deadline_holds_over_all_calls() -> None:
    reader = Reader(timeout=5)
    reader.append(next(run_of([ANSWER])))
    reader.clock.now += 2
    assert reader.stream.time_left() == 3
    with pytest.raises(DeadlineExceededError):
        [*iter(lambda: reader.fails(REFUSED), None)]
    assert reader.stream.wants_cancel


def test_stream_that_never_reached_a_gateway_fails_at_once() -> None:
    with pytest.raises(UnreachableError, match="nothing answers"):
        Reader().fails(REFUSED)


def test_error_of_the_gateway_ends_the_stream() -> None:
    reader = Reader()
    reader.append(next(run_of([ANSWER])))
    with pytest.raises(UnavailableError, match="no replica"):
        reader.fails(UnavailableError("no replica", request_id="abc"))
    assert not reader.stream.wants_cancel


def test_restarted_gateway_is_waited_for_until_it_takes_the_stream() -> None:
    reader = Reader()
    reader.append(next(run_of([ANSWER])))
    reader.fails(UNKNOWN)
    waited = reader.fails(UnavailableError("no replica", request_id="abc", retry_after=2.0))
    assert waited == 2.0
    assert isinstance(reader.request, TextCompleteStreamRequest)


def test_resumed_events_are_unpacked() -> None:
    reader = Reader()
    [started, *_] = run_of([ANSWER])
    reader.stream.on_response(ResumeStreamResponse(event=started.event))
    assert reader.stream.next_request() == ResumeStreamRequest(
        stream_name=reader.stream.name, after_event_number=1
    )
