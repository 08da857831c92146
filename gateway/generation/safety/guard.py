"""Applies the safety classifier to a request: dialogs and texts are judged before anything is
generated, answers in chunks while they grow. A chunk leaves the gateway only after its verdict; the
model continues meanwhile. The same holds for streams and unary calls.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from gateway.generation.events import AnswerKey, Event, KeyedEvent, Refusal, Started
from gateway.generation.safety.classifier import Judgement, SafetyClient, Subject, TimeRemaining
from gateway.generation.safety.moderation_buffer import ModerationBuffer
from gateway.request.draft import Prompt
from gateway.request.options import Options
from llama.prompt_format.dialog import Message, drop_oldest_turns
from llama.v1.sampling_pb2 import FINISH_REASON_SAFETY
from serving.errors import Violation

# The refusal that the chat models themselves give. The continuation of an unsafe text is empty.
DIALOG_REFUSAL = "I apologize, but I cannot fulfill your request."


def dialogs_to_judge(
    prompts: Sequence[Prompt | Refusal], dialogs: Sequence[Sequence[Message]]
) -> list[Subject]:
    """The dialog of each prompt, without dropped turns; empty for a refusal. These are held until
    the answers end, so they contain no more than is judged.
    """
    return [
        () if isinstance(prompt, Refusal) else drop_oldest_turns(dialog, prompt.dropped_turns)
        for prompt, dialog in zip(prompts, dialogs, strict=True)
    ]


def unsafe_violations(paths: Iterable[str], checked: Sequence[Prompt | Refusal]) -> list[Violation]:
    """The violation of each refused prompt, for calls that can answer with no refusal."""
    return [
        Violation(path, f"is unsafe by the safety classifier: {', '.join(each.safety_categories)}")
        for path, each in zip(paths, checked, strict=True)
        if isinstance(each, Refusal)
    ]


class Guard:
    """The judgements of one request, whose dialogs or texts are the `subjects`."""

    def __init__(
        self,
        classifier: SafetyClient,
        subjects: Sequence[Subject],
        options: Options,
        time_remaining: TimeRemaining,
    ) -> None:
        self._classifier = classifier
        self._subjects = subjects
        self._options = options
        self._time_remaining = time_remaining
        self._unjudged: set[int] = set()  # indices of refused subjects, which get no answer
        self._answers: dict[AnswerKey, ModerationBuffer] = {}
        self._judging: dict[asyncio.Task[Judgement], AnswerKey] = {}

    async def check(self, prompts: Sequence[Prompt | Refusal]) -> list[Prompt | Refusal]:
        """The prompts, with a refusal in place of each whose subject is unsafe."""
        checked = [*prompts]
        judging = {
            index: self._judge(subject)
            for index, subject in enumerate(self._subjects)
            if isinstance(prompts[index], Prompt)
        }
        try:
            judgements = await asyncio.gather(*judging.values())
        finally:
            await _cancel(judging.values())
        for index, judgement in zip(judging, judgements, strict=True):
            if judgement.unsafe:
                text = "" if isinstance(self._subjects[index], str) else DIALOG_REFUSAL
                checked[index] = Refusal(text, FINISH_REASON_SAFETY, judgement.categories)
        self._unjudged = {i for i, each in enumerate(checked) if isinstance(each, Refusal)}
        return checked

    async def watch(
        self, events: AsyncGenerator[KeyedEvent, None], cancel: Callable[[AnswerKey], None]
    ) -> AsyncGenerator[KeyedEvent, None]:
        """The events of the checked prompts, each as soon as it may be shown; owns `events`.

        `cancel` ends an unsafe answer. Close this after use, like `complete`.
        """
        async with aclosing(events):
            next_event: asyncio.Task[KeyedEvent | None] | None = _read(events)
            try:
                while next_event or self._judging:
                    waited_for: list[asyncio.Task[Any]] = [*self._judging]
                    if next_event:
                        waited_for.append(next_event)
                    await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
                    for shown in self._on_verdicts(cancel):
                        yield shown
                    if next_event and next_event.done():
                        keyed = next_event.result()
                        next_event = None
                        if keyed is not None:
                            for shown in self._on_event(*keyed):
                                yield shown
                            next_event = _read(events)
            finally:
                await _cancel([*self._judging, *([next_event] if next_event else [])])

    def _on_event(self, key: AnswerKey, event: Event) -> Iterator[KeyedEvent]:
        if isinstance(event, Started):
            if key.index not in self._unjudged:
                self._answers[key] = self._hold(key)
            yield key, event
        elif key in self._answers:
            yield from self._show(key, self._answers[key].on_event(event))
        else:
            yield key, event

    def _on_verdicts(self, cancel: Callable[[AnswerKey], None]) -> Iterator[KeyedEvent]:
        for task in [task for task in self._judging if task.done()]:
            key, judgement = self._judging.pop(task), task.result()
            if judgement.unsafe:
                cancel(key)
            yield from self._show(key, self._answers[key].on_verdict(judgement))

    def _show(self, key: AnswerKey, events: Iterable[Event]) -> Iterator[KeyedEvent]:
        """Yields the events, and starts the judgement of the next chunk if one is due."""
        subject = self._answers[key].next_chunk()
        if subject is not None:
            self._judging[self._judge(subject)] = key
        for event in events:
            yield key, event

    def _hold(self, key: AnswerKey) -> ModerationBuffer:
        subject = self._subjects[key.index]
        if self._options.echo:
            subject = ""  # the answer begins with it
        return ModerationBuffer(subject, self._classifier.chunk, logprobs=self._options.logprobs)

    def _judge(self, subject: Subject) -> asyncio.Task[Judgement]:
        return asyncio.create_task(self._classifier.judge(subject, self._time_remaining))


def _read(events: AsyncGenerator[KeyedEvent, None]) -> asyncio.Task[KeyedEvent | None]:
    async def read() -> KeyedEvent | None:
        return await anext(events, None)

    return asyncio.create_task(read())


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended."""
    tasks = [*tasks]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
