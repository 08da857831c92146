"""The one code path of the completion RPCs and of Score: check, admit, encode, judge, generate.

Checks come first, because they cost little. From admission on, everything happens within contexts
that give back what the request holds, however it ends.
"""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from gateway.admission.admission import Admission
from gateway.generation.completion import Generations, complete
from gateway.generation.events import SPECIAL_TAGS_REFUSAL, AnswerKey, KeyedEvent, Refusal
from gateway.generation.generation import Outcome
from gateway.generation.safety.classifier import Subject
from gateway.generation.safety.guard import Guard, dialogs_to_judge, unsafe_violations
from gateway.generation.send_buffer import SendBuffer
from gateway.request.draft import Prompt
from gateway.request.options import (
    ChatRequest,
    ModelRequest,
    Options,
    RequestLimits,
    TextRequest,
    UnaryRequest,
    answer_room,
    options,
    score_options,
)
from gateway.request.prompts import encode_dialogs, encode_texts
from gateway.request.read_dialogs import Dialogs, read_dialogs
from gateway.request.scoring import Scoring, encode_candidates, read_scoring
from gateway.request.tokenization import TokenizerTools
from gateway.request.turn_dropper import Encode
from gateway.request.validation import chat_violations, text_violations
from gateway.request.window import Window
from gateway.rpc.access_log import Accounting, Context
from gateway.rpc.messages import prompt_format_message
from gateway.rpc.unary import AnswerSize, score_size_violations, size_violations
from gateway.rpc.upstreams import Backend
from gateway.text.detokenizer import text_of
from llama.prompt_format.formats import PromptFormat
from llama.v1 import chat_pb2
from serving.errors import RequestError, Violation, invalid_argument
from serving.security import caller

# Characters of an unknown model's name that an error shows, so that the rest of the error fits.
MAX_SHOWN_NAME = 64
# Seconds until the deadline; None: there is none.
TimeRemaining = Callable[[], float | None]
# The prompts of a request, and for each the dialog or text that a safety classifier judges.
Encoded = tuple[list[Prompt | Refusal], Sequence[Subject]]


@dataclass(frozen=True, slots=True)
class _Checked:
    """A valid request. It does not hold the message itself, which can have megabytes."""

    options: Options
    sequences: int
    # No closure: the frame of an error would hold its variables until the garbage collector runs.
    encode: Callable[[], Awaitable[Encoded]]
    scores: bool = False  # nothing is generated, and `encode` has the candidates judged


@dataclass(frozen=True, slots=True)
class PipelineLimits:
    """Limits on requests and their answers."""

    request: RequestLimits
    response_bytes: int  # of a unary answer
    send_buffer_bytes: int  # of one generation's events that wait for the client


class Pipeline:
    """Answers completion requests."""

    def __init__(
        self,
        backend: Backend,
        limits: PipelineLimits,
        admission: Admission,
        accounting: Accounting,
    ) -> None:
        self._tokenizer = backend.tokenizer
        self._replicas = backend.replicas
        self._classifier = backend.classifier
        self._limits = limits
        self.admission = admission
        self.accounting = accounting

    async def run(
        self, request: ModelRequest, context: Context
    ) -> AsyncGenerator[KeyedEvent, None]:
        """The events of a request's answers, interleaved; close it (contextlib.aclosing).

        Raises:
            RequestError: a rule is broken, the queue is full, an upstream is unavailable, or the
                client reads too slowly.
        """
        with self.accounting.account(request, context) as account:
            if isinstance(request, ChatRequest):
                checked = await self._check_chat(request, context)
            elif isinstance(request, TextRequest):
                checked = self._check_text(request, context)
            else:
                checked = self._check_score(request, context)
            is_unary = isinstance(request, UnaryRequest)
            size = AnswerSize(self._limits.response_bytes) if is_unary else None
            # A named stream outlives the call that started it.
            lasts = bool(getattr(request, "stream_name", ""))
            time_remaining = _without_end if lasts else context.time_remaining
            del request  # can have megabytes, and its callers have dropped it, too
            chosen, sequences = checked.options, checked.sequences
            limit = self._limits.response_bytes
            if size is not None and not checked.scores:
                window, vocabulary = self.window(), self._tokenizer.vocabulary
                refuse(size_violations(chosen, sequences, window, vocabulary, limit))
            time_left = context.time_remaining()
            with self.admission.admit(sequences, chosen.priority, time_left) as admitted:
                prompts, subjects = await checked.encode()
                guard = None
                if self._classifier is not None and not checked.scores:
                    guard = Guard(self._classifier, subjects, chosen, time_remaining)
                    prompts = await guard.check(prompts)
                del checked, subjects
                max_bytes = self._limits.send_buffer_bytes * len(prompts) * chosen.n
                if size is not None:  # its client waits for all of it
                    max_bytes = max(max_bytes, limit)
                async with SendBuffer[AnswerKey, Outcome](max_bytes) as buffer:
                    generations = Generations()
                    events = complete(
                        prompts,
                        chosen,
                        self._tokenizer.vocabulary,
                        self._replicas,
                        admitted,
                        prompt_format=prompt_format_message(self.prompt_format),
                        arrived=account.arrived,
                        buffer=buffer,
                        generations=generations,
                    )
                    if guard is not None:
                        events = guard.watch(events, generations.cancel)
                    async with aclosing(events):
                        async for key, event in events:
                            if size is not None:
                                size.add(event)
                            account.observe(key, event)
                            yield key, event

    async def _check_chat(self, request: ChatRequest, context: Context) -> _Checked:
        self.require_model(request.model)
        vocabulary, window, limits = self._tokenizer.vocabulary, self.window(), self.limits()
        read = await read_dialogs(request.dialogs, limits, self.prompt_format)
        refuse(chat_violations(request, read.violations, limits, len(vocabulary)))
        chosen = options(request, window.length)
        room = answer_room(request.context_policy, window, chosen.sampling.max_gen_len)
        encode = functools.partial(self._encode_chat, read, window, room, context)
        return _Checked(chosen, len(read.safe) * chosen.n, encode)

    def _check_text(self, request: TextRequest, context: Context) -> _Checked:
        self.require_model(request.model)
        vocabulary, window = self._tokenizer.vocabulary, self.window()
        refuse(text_violations(request, self.limits(), len(vocabulary), window))
        chosen = options(request, window.length)
        texts, ids = [*request.prompts], [[*each.ids] for each in request.prompt_ids]
        encode = functools.partial(self._encode_text, texts, ids, window, context)
        return _Checked(chosen, (len(texts) + len(ids)) * chosen.n, encode)

    def _check_score(self, request: chat_pb2.ScoreRequest, context: Context) -> _Checked:
        self.require_model(request.model)
        vocabulary, window = self._tokenizer.vocabulary, self.window()
        scoring = read_scoring(request, self.limits(), len(vocabulary), window, self.prompt_format)
        chosen = score_options(request)
        encode = functools.partial(self._encode_score, scoring, chosen, window, context)
        return _Checked(chosen, scoring.candidates, encode, scores=True)

    async def _encode_chat(
        self, read: Dialogs, window: Window, room: int | None, context: Context
    ) -> Encoded:
        encoder = self.encoder(context.time_remaining)
        encoded = await encode_dialogs(
            read.safe, encoder, window, answer_room=room, prompt_format=self.prompt_format
        )
        by_path = dict(zip(read.safe, encoded, strict=True))
        prompts = [by_path.get(path, SPECIAL_TAGS_REFUSAL) for path in read.messages]
        if self._classifier is None:
            return prompts, []
        return prompts, dialogs_to_judge(prompts, [*read.messages.values()])

    async def _encode_text(
        self, texts: list[str], ids: list[list[int]], window: Window, context: Context
    ) -> Encoded:
        if ids:
            prompts = [Prompt(each) for each in ids]
        else:
            named = {f"prompts[{index}]": text for index, text in enumerate(texts)}
            prompts = await encode_texts(named, self.encoder(context.time_remaining), window)
        if self._classifier is None:
            return [*prompts], []
        vocabulary = self._tokenizer.vocabulary
        return [*prompts], texts or [text_of(each.ids, vocabulary) for each in prompts]

    async def _encode_score(
        self, scoring: Scoring, chosen: Options, window: Window, context: Context
    ) -> Encoded:
        """The prompts of a request whose candidates are safe, or else INVALID_ARGUMENT."""
        vocabulary = self._tokenizer.vocabulary
        prompts = await encode_candidates(scoring, self.encoder(context.time_remaining), window)
        limit = self._limits.response_bytes
        refuse(score_size_violations(chosen, prompts, vocabulary, limit))
        if self._classifier is not None:
            subjects = scoring.subjects(prompts, vocabulary)
            guard = Guard(self._classifier, subjects, chosen, context.time_remaining)
            paths = map(scoring.path, range(scoring.candidates))
            refuse(unsafe_violations(paths, await guard.check(prompts)))
        return [*prompts], []

    def tokenizer_tools(self, model: str, context: Context) -> TokenizerTools:
        """The tokenizer for a call that needs no model time; NOT_FOUND as `require_model`."""
        self.require_model(model)
        return TokenizerTools(
            self._tokenizer.vocabulary,
            self.prompt_format,
            self.window(),
            self.encoder(context.time_remaining),
            self.limits(),
            self._limits.response_bytes,
            functools.partial(self.admission.admit, 1, 0, context.time_remaining()),
        )

    def require_model(self, name: str) -> None:
        """NOT_FOUND if a request names another model than the one that is served."""
        served = self._replicas.model.name
        if name not in ("", served):
            shown = name if len(name) <= MAX_SHOWN_NAME else f"{name[:MAX_SHOWN_NAME]}…"
            message = f"model: {shown!r} is not served here, {served!r} is"
            raise RequestError(grpc.StatusCode.NOT_FOUND, message)

    def window(self) -> Window:
        """The model's context; UNAVAILABLE before the vocabulary is read or without a replica."""
        vocabulary = self._tokenizer.vocabulary
        max_token_bytes, has_bos = vocabulary.max_token_bytes, vocabulary.bos_id is not None
        return Window(self._replicas.model.context_length, max_token_bytes, has_bos)

    @property
    def prompt_format(self) -> PromptFormat:
        """The format of the served model's prompts."""
        return self._tokenizer.prompt_format

    def limits(self) -> RequestLimits:
        """The limits of the current caller."""
        return self._limits.request.within(caller.current().limits)

    def encoder(self, time_remaining: TimeRemaining) -> Encode:
        """The function that encodes segments within the caller's deadline."""
        return functools.partial(self._tokenizer.encode, time_remaining=time_remaining)


def refuse(violations: Sequence[Violation]) -> None:
    """INVALID_ARGUMENT if there are violations."""
    if violations:
        raise invalid_argument(violations)


def _without_end() -> None:
    """The remaining time of a named stream: None, as it has no deadline."""
