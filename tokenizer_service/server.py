"""TokenizerService over gRPC: limits and field-level errors around a `Tokenizer`.

The libraries run in worker threads (they release the interpreter lock), because the largest request
takes seconds and health checks must not wait for it. The bytes that are encoded or decoded at once
are bounded, because SentencePiece needs about 70 bytes of memory for each, and `tokenizers` up to
200. Callers take turns.
"""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import grpc
from prometheus_client import Counter

from llama.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from llama.v1.sampling_pb2 import TokenIds
from llama.v1.tokenizer_pb2 import (
    DecodeRequest,
    DecodeResponse,
    EncodeRequest,
    EncodeResponse,
    GetVocabularyRequest,
    GetVocabularyResponse,
)
from serving.errors import Violation, invalid_argument
from serving.intake.fair_semaphore import FairSemaphore
from serving.server import Service
from tokenizer_service.tokenizer import ControlTokenError, TokenIdError, Tokenizer

MAX_SEGMENTS = 4096
# The caller is the name of an API key.
MAX_CALLER_CHARACTERS = 64
# The limit for all requests that run at once; a larger request runs alone.
MAX_BYTES_AT_ONCE = 1024 * 1024
# Added to the bytes of each call, so that the number of tiny calls is bounded, too.
CALL_BYTES = 1024
ResponseT = TypeVar("ResponseT")
SERVICE_NAME = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name


def tokenizer_service(tokenizer: Tokenizer) -> Service:
    """The service as `serving` runs it: healthy as soon as it listens."""
    servicer = TokenizerServicer(tokenizer)

    def register(server: grpc.aio.Server) -> None:
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, server)

    return Service(names=[SERVICE_NAME], register=register, collectors=servicer.metrics)


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._semaphore = FairSemaphore(MAX_BYTES_AT_ONCE)
        self._segments = Counter(
            "chasqui_tokenizer_segments_total", "Segments encoded.", registry=None
        )
        self._bytes = Counter(
            "chasqui_tokenizer_bytes_total", "Bytes of text encoded, in UTF-8.", registry=None
        )
        self._tokens = Counter(
            "chasqui_tokenizer_tokens_total", "Tokens that they became.", registry=None
        )
        self.metrics = (self._segments, self._bytes, self._tokens)
        self._vocabulary = GetVocabularyResponse(
            pieces=tokenizer.vocabulary(),
            bos_id=tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id if tokenizer.pad_id >= 0 else None,
            dummy_prefix=tokenizer.dummy_prefix,
            fingerprint=tokenizer.fingerprint,
            max_token_bytes=tokenizer.max_token_bytes,
            eos_ids=tokenizer.eos_ids,
            chat_template=tokenizer.chat_template,
            byte_level=tokenizer.byte_level,
        )

    async def Encode(self, request: EncodeRequest, _context: object) -> EncodeResponse:
        _check_count("segments", len(request.segments))
        if len(request.caller) > MAX_CALLER_CHARACTERS:
            rule = f"must have at most {MAX_CALLER_CHARACTERS} characters"
            raise invalid_argument([Violation("caller", f"{rule}, not {len(request.caller)}")])
        async with self._semaphore.acquire(request.caller, CALL_BYTES + request.ByteSize()):
            return await _to_its_end(asyncio.to_thread(self._encode, request))

    async def Decode(self, request: DecodeRequest, _context: object) -> DecodeResponse:
        _check_count("sequences", len(request.sequences))
        async with self._semaphore.acquire("", CALL_BYTES + request.ByteSize()):
            return await _to_its_end(asyncio.to_thread(self._decode, request))

    async def GetVocabulary(
        self, _request: GetVocabularyRequest, _context: object
    ) -> GetVocabularyResponse:
        return self._vocabulary

    def _encode(self, request: EncodeRequest) -> EncodeResponse:
        encode, segments, violations = self._tokenizer.encode, [], []
        for index, each in enumerate(request.segments):
            try:
                ids = encode(each.text, each.bos, each.eos, each.control_token)
                segments.append(TokenIds(ids=ids))
            except ControlTokenError as error:
                violations.append(Violation(f"segments[{index}].control_token", str(error)))
            except ValueError as error:
                violations.append(Violation(f"segments[{index}].text", str(error)))
        if violations:
            raise invalid_argument(violations)
        self._segments.inc(len(segments))
        self._bytes.inc(sum(len(segment.text.encode()) for segment in request.segments))
        self._tokens.inc(sum(len(segment.ids) for segment in segments))
        return EncodeResponse(segments=segments)

    def _decode(self, request: DecodeRequest) -> DecodeResponse:
        texts, violations = [], []
        for index, sequence in enumerate(request.sequences):
            try:
                texts.append(self._tokenizer.decode(sequence.ids))
            except TokenIdError as error:
                field = f"sequences[{index}].ids[{error.index}]"
                violations.append(Violation(field, error.rule))
        if violations:
            raise invalid_argument(violations)
        return DecodeResponse(texts=texts)


async def _to_its_end(work: Coroutine[None, None, ResponseT]) -> ResponseT:
    """The result of work in a thread.

    A thread cannot be interrupted, so a cancelled call keeps its turn until the thread is done.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _check_count(field: str, count: int) -> None:
    if count > MAX_SEGMENTS:
        raise invalid_argument([Violation(field, f"at most {MAX_SEGMENTS} a call, got {count}")])
