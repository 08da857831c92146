"""The buffer of one answer for the safety classifier: which part to judge next, and which events
may be shown. Does no input or output. A chunk ends before a space, so that half a word is not
mistaken for a whole one of another meaning.
"""

import codecs
from collections.abc import Sequence
from dataclasses import replace

from gateway.generation.events import Delta, Event, Finished
from gateway.generation.safety.classifier import Judgement, Subject
from llama.prompt_format.dialog import ASSISTANT, Message
from llama.v1.sampling_pb2 import FINISH_REASON_SAFETY

# A chunk without a space within this many times its size is cut inside a word.
_LONGEST_CHUNK = 2


class ModerationBuffer:
    """The part of an answer that is generated and not yet shown.

    `on_event` and `on_verdict` return the events that may be shown now; call `next_chunk` after
    either. With `logprobs` the text to judge is taken from the tokens, because these are sent even
    while their text is held back, as the possible beginning of a stop string.
    """

    def __init__(self, subject: Subject, chunk: int, *, logprobs: bool) -> None:
        self._subject = subject
        self._chunk = chunk
        self._logprobs = logprobs
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._answer = ""  # up to the end of the last chunk
        self._in_judgement: list[Delta] | None = None
        self._held: list[tuple[Delta, str]] = []  # after that chunk, each with its text to judge
        self._held_size = 0  # characters
        self._words = 0  # how many of the held deltas come before the last space
        self._words_size = 0
        self._unsafe: Judgement | None = None
        self._finished: Finished | None = None

    def on_event(self, event: Delta | Finished) -> list[Event]:
        """Handles the next event of the answer."""
        if isinstance(event, Finished):
            self._finished = event
        elif self._unsafe is None:
            self._hold(event)
        return self._end()

    def next_chunk(self) -> Subject | None:
        """The dialog or text, and the answer up to the end of the next chunk; None: none is due."""
        if self._in_judgement is not None or not self._held_size:
            return None
        if self._finished is None and self._words_size >= self._chunk:
            return self._judge(self._words, self._words_size)
        if self._finished or self._held_size >= _LONGEST_CHUNK * self._chunk:
            return self._judge(len(self._held), self._held_size)
        return None

    def on_verdict(self, judgement: Judgement) -> list[Event]:
        """Handles the verdict on the last chunk."""
        chunk, self._in_judgement = self._in_judgement or [], None
        if judgement.unsafe:
            self._unsafe = judgement
            self._held, self._held_size = [], 0
            return self._end()
        return [*_joined(chunk), *self._end()]

    def _hold(self, delta: Delta) -> None:
        text = delta.text
        if self._logprobs:
            text = self._decoder.decode(b"".join(token.bytes for token in delta.tokens))
        if text[:1].isspace():
            self._words, self._words_size = len(self._held), self._held_size
        self._held.append((delta, text))
        self._held_size += len(text)

    def _judge(self, count: int, size: int) -> Subject:
        chunk, self._held = self._held[:count], self._held[count:]
        self._held_size -= size
        self._words = self._words_size = 0
        self._in_judgement = [delta for delta, _ in chunk]
        self._answer += "".join(text for _, text in chunk)
        if isinstance(self._subject, str):
            return self._subject + self._answer
        return [*self._subject, Message(ASSISTANT, self._answer)]

    def _end(self) -> list[Event]:
        """The last events, if nothing is left to be judged."""
        if self._finished is None or self._in_judgement is not None or self._held_size:
            return []
        if self._unsafe is not None:
            categories = self._unsafe.categories
            unsafe = replace(
                self._finished, reason=FINISH_REASON_SAFETY, safety_categories=categories
            )
            return [unsafe]
        rest, self._held = [delta for delta, _ in self._held], []
        return [*_joined(rest), self._finished]


def _joined(deltas: Sequence[Delta]) -> list[Event]:
    """A chunk merged into one delta, to cost one message."""
    if not deltas:
        return []
    tokens = [token for delta in deltas for token in delta.tokens]
    text = "".join(delta.text for delta in deltas)
    return [Delta(text, tokens, deltas[-1].completion_tokens)]
