"""What a unary call answers: the events of its request, folded, and how large that may become.

gRPC's clients refuse a message of more than 4 MiB by default, when all of its work has been done.
So a request whose token details could outgrow the limit is refused before it runs, and any other is
stopped as soon as it has outgrown it. Until then an answer's tokens are kept as they go over the
wire: as objects of the protobuf library they take nine times as much.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from gateway.generation.answer import Delta
from gateway.generation.completion import Finished, Place, PlacedEvent, Prediction, Started
from gateway.request.prompts import Window
from gateway.request.validation import Options
from gateway.text.detokenizer import Vocabulary
from llama.v1 import chat_pb2
from serving.errors import RequestError, Violation, resource_exhausted
from serving.intake.time_slice import TimeSlice

# What a prediction has beside its text and its tokens: usage, seed, fingerprint.
PREDICTION_BYTES = 512
# A token's or an alternative's, beside its text and its bytes: id, logprob, tags and lengths.
_ENTRY_BYTES = 15


def size_violations(
    chosen: Options, sequences: int, window: Window, vocabulary: Vocabulary, max_bytes: int
) -> list[Violation]:
    """The rule that a unary request breaks if its token details could be more than its answer may
    hold: as many tokens as it allows, each and each alternative of the vocabulary's mean length.
    """
    if not chosen.logprobs:
        return []
    tokens = min(chosen.sampling.max_gen_len, window.length - 1)
    if chosen.prompt_logprobs:
        tokens = window.length
    entries = sequences * tokens * (1 + chosen.top_logprobs)
    size = round(entries * (_ENTRY_BYTES + 2 * vocabulary.mean_token_bytes))
    if size <= max_bytes:
        return []
    rule = (
        f"with {sequences} answers of up to {tokens} tokens could take about {size} bytes, and a "
        f"unary answer may have {max_bytes}: lower sampling.max_gen_len, n or the number of "
        "prompts, or call the streaming method"
    )
    return [Violation("top_logprobs" if chosen.top_logprobs else "logprobs", rule)]


async def within(
    events: AsyncGenerator[PlacedEvent, None], max_bytes: int
) -> AsyncGenerator[PlacedEvent, None]:
    """The same events; RESOURCE_EXHAUSTED as soon as their predictions have more bytes."""
    size = 0
    async with aclosing(events):
        async for place, event in events:
            match event:
                case Started():
                    size += PREDICTION_BYTES
                case Delta():
                    # Each token with its tag and length.
                    size += len(event.text.encode())
                    size += sum(token.ByteSize() + 4 for token in event.tokens)
            if size > max_bytes:
                raise _too_large(max_bytes)
            yield place, event


async def fold(events: AsyncIterator[PlacedEvent]) -> list[Prediction]:
    """The predictions of a request, in the order in which its generations were begun."""
    started: dict[Place, Started] = {}
    texts: defaultdict[Place, list[str]] = defaultdict(list)
    tokens: defaultdict[Place, list[bytes]] = defaultdict(list)
    finished: dict[Place, Finished] = {}
    async for place, event in events:
        match event:
            case Started():
                started[place] = event
            case Delta():
                texts[place].append(event.text)
                if event.tokens:
                    part = chat_pb2.Prediction(tokens=event.tokens)
                    tokens[place].append(part.SerializeToString())
            case Finished():
                finished[place] = event
    return [
        Prediction(place, begun, "".join(texts[place]), tokens[place], finished[place])
        for place, begun in started.items()
    ]


async def add_tokens(message: chat_pb2.Prediction, prediction: Prediction) -> None:
    """Puts a prediction's tokens into its message, in steps between which others run."""
    time_slice = TimeSlice()
    for part in prediction.tokens:
        message.MergeFromString(part)
        await time_slice.yield_if_over()


def _too_large(max_bytes: int) -> RequestError:
    message = (
        f"the answer has more than {max_bytes} bytes, which is what a unary answer may have: lower "
        "sampling.max_gen_len, n or the number of prompts, or call the streaming method"
    )
    return resource_exhausted(message, "max_response_bytes", retry_after=None)
