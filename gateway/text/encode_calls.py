"""The calls of the tokenizer service that a request takes, and the errors of those that fail."""

from collections.abc import Iterator, Sequence

import grpc

from llama.prompt_format.dialog import Segment
from llama.v1 import tokenizer_pb2
from serving.errors import RequestError, resource_exhausted

MAX_SEGMENTS_PER_CALL = 4096  # the contract's limit
# Bytes of text in one call. A larger request takes several calls, and others take turns with it.
BYTES_PER_CALL = 256 * 1024
# The cost of a segment beyond its bytes.
_SEGMENT_BYTES = 64


def encode_calls(
    segments: Sequence[Segment], caller_name: str
) -> Iterator[tuple[tokenizer_pb2.EncodeRequest, int]]:
    """The Encode requests for the segments, each with its cost."""
    request, cost = tokenizer_pb2.EncodeRequest(caller=caller_name), 0
    for each in segments:
        size = len(each.text.encode()) + _SEGMENT_BYTES
        full = cost + size > BYTES_PER_CALL or len(request.segments) == MAX_SEGMENTS_PER_CALL
        if request.segments and full:
            yield request, cost
            request, cost = tokenizer_pb2.EncodeRequest(caller=caller_name), 0
        request.segments.add(
            text=each.text, bos=each.bos, eos=each.eos, control_token=each.control_token
        )
        cost += size
    if request.segments:
        yield request, cost


def refusal_of(error: grpc.aio.AioRpcError) -> RequestError | None:
    """The error of a request whose Encode failed; None: an unexpected status, which is a bug."""
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return RequestError(error.code(), "the deadline passed while the prompt was encoded")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            message = f"the prompt is too large for the tokenizer service: {error.details()}"
            return resource_exhausted(message, "max_request_bytes", retry_after=None)
        case grpc.StatusCode.INVALID_ARGUMENT:  # the model's tokenizer fails on the text
            return RequestError(error.code(), f"the prompt cannot be encoded: {error.details()}")
    return None
