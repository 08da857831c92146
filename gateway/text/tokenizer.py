"""The client of the tokenizer service: the vocabulary, read once, and `Encode`. The vocabulary
never changes while the gateway runs, because running answers are decoded with it: a tokenizer
service that comes back with another model file is refused.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import grpc
import structlog

from gateway.text.encode_calls import encode_calls, refusal_of
from gateway.text.vocabulary import Vocabulary
from gateway.upstream.connect import Connect, connected
from gateway.upstream.session import (
    FIRST_PAUSE,
    SessionEndedError,
    UnfitUpstreamError,
    Upstream,
    answer,
    call_metadata,
    follow_health,
    keep_session,
)
from llama.prompt_format.dialog import Segment
from llama.prompt_format.formats import LLAMA2
from llama.prompt_format.recognition import (
    FormatName,
    PromptFormatError,
    choose_format,
    require_control_tokens,
)
from llama.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from llama.v1.operator_pb2 import UPSTREAM_STATE_CONNECTING
from serving.errors import RequestError, unavailable
from serving.intake.fair_semaphore import FairSemaphore
from serving.security import caller

SERVICE = "llama.v1.TokenizerService"
# Bytes of text that are encoded at once, for all callers; further calls wait for their turn.
MAX_BYTES_AT_ONCE = 1024 * 1024
# The statuses of a call whose server is lost.
_CUT_OFF = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

_log = structlog.stdlib.get_logger(__name__)


class TokenizerClient:
    """A session with the tokenizer service; `changed` is called when `ready` may have changed."""

    def __init__(
        self,
        target: str,
        changed: Callable[[], None],
        connect: Connect,
        patience: float,
        prompt_format: FormatName = "auto",
    ) -> None:
        """`patience`: seconds that a call waits for a lost service to come back."""
        self.upstream = Upstream(target, changed)
        self._patience = patience
        self._connect = connect
        self._semaphore = FairSemaphore(MAX_BYTES_AT_ONCE)
        self._stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub | None = None  # while connected
        self._vocabulary: Vocabulary | None = None
        self._format_name = prompt_format
        self.prompt_format = LLAMA2  # that of the vocabulary, once there is one
        self._loaded = asyncio.Event()
        self.fingerprint = ""

    @property
    def ready(self) -> bool:
        return self.upstream.serving

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary; UNAVAILABLE before the first session."""
        if self._vocabulary is None:
            raise _unavailable()
        return self._vocabulary

    async def loaded(self) -> Vocabulary:
        """Waits for the first session and returns its vocabulary."""
        await self._loaded.wait()
        return self.vocabulary

    async def run(self) -> NoReturn:
        """Keeps a session; ends when cancelled."""
        _log.info("connecting to tokenizer service", upstream=self.upstream.target)
        await keep_session(self.upstream, self._session)

    async def encode(
        self, segments: Sequence[Segment], time_remaining: Callable[[], float | None]
    ) -> list[Sequence[int]]:
        """The ids of each segment, in as few calls as their limits allow.

        The text that is encoded at once is bounded, so a call waits for its turn among callers.
        """
        key = caller.current()
        encoded: list[Sequence[int]] = []
        for request, cost in encode_calls(segments, key.name):
            await self._until_serving()
            async with self._semaphore.acquire(key.name, cost, key.limits.weight):
                response = await self._encode(request, time_remaining)
            encoded += [each.ids for each in response.segments]
        return encoded

    async def _until_serving(self) -> None:
        """Waits for the service before a turn is taken, so that no turn is spent on waiting."""
        try:
            async with asyncio.timeout(self._patience):
                await self.upstream.until_serving()
        except TimeoutError:
            raise _unavailable() from None

    async def _encode(
        self,
        request: tokenizer_pb2.EncodeRequest,
        time_remaining: Callable[[], float | None],
    ) -> tokenizer_pb2.EncodeResponse:
        try:
            async with asyncio.timeout(self._patience):
                return await self._encode_when_ready(request, time_remaining)
        except TimeoutError:
            raise _unavailable() from None

    async def _encode_when_ready(
        self,
        request: tokenizer_pb2.EncodeRequest,
        time_remaining: Callable[[], float | None],
    ) -> tokenizer_pb2.EncodeResponse:
        """Retries Encode until it succeeds, which is safe because it has no side effects."""
        while True:
            await self.upstream.until_serving()
            if self._stub is None:  # the session ended before this task resumed
                continue
            call = self._stub.Encode(request, timeout=time_remaining(), metadata=call_metadata())
            with suppress(SessionEndedError):
                try:
                    return await answer(call)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _CUT_OFF:
                        if (refusal := refusal_of(error)) is None:
                            raise
                        raise refusal from error
            await asyncio.sleep(FIRST_PAUSE)

    async def _session(self) -> None:
        async with connected(self._connect, self.upstream.target) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            self._set_vocabulary(await stub.GetVocabulary(tokenizer_pb2.GetVocabularyRequest()))
            self._stub = stub
            try:
                await follow_health(channel, SERVICE, self.upstream)
            finally:
                # Before the channel closes, so that no new call uses it.
                self._stub = None
                self.upstream.become(UPSTREAM_STATE_CONNECTING, "the session broke")

    def _set_vocabulary(self, response: tokenizer_pb2.GetVocabularyResponse) -> None:
        if self._vocabulary is None:
            control_ids = {each.name: i for i, each in enumerate(response.pieces) if each.name}
            try:
                chosen = choose_format(self._format_name, response.chat_template)
                require_control_tokens(chosen, control_ids)
            except PromptFormatError as error:
                raise UnfitUpstreamError(str(error)) from error
            # A tokenizer service of an earlier version tells eos_id alone.
            eos_ids = response.eos_ids or [response.eos_id]
            answer_ends = (control_ids[each] for each in chosen.answer_ends)
            self._vocabulary = Vocabulary.build(
                ((piece.bytes, piece.kind) for piece in response.pieces),
                dummy_prefix=response.dummy_prefix,
                eos_ids=(*dict.fromkeys((*eos_ids, *answer_ends)),),
                bos_id=response.bos_id if response.HasField("bos_id") else None,
                byte_level=response.byte_level,
                control_ids=control_ids,
                chat_template=response.chat_template,
                max_token_bytes=response.max_token_bytes or None,
            )
            self.prompt_format = chosen
            self.fingerprint = response.fingerprint
            self._loaded.set()
        elif response.fingerprint != self.fingerprint:
            raise UnfitUpstreamError(
                f"serves another model file ({response.fingerprint[:12]}) than when this gateway "
                f"started ({self.fingerprint[:12]}): restart the gateway to use it"
            )
        _log.info(
            "tokenizer service connected",
            upstream=self.upstream.target,
            tokens=len(response.pieces),
            prompt_format=self.prompt_format.name,
        )


def _unavailable() -> RequestError:
    return unavailable("the tokenizer service is not available")
