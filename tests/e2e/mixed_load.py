"""Callers of every kind, well-behaved and not, whose visits are chosen at random from a seed. Each
kind of visit states how it may end; any other end fails the run.
"""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc

from client import AsyncClient, ChasquiError, Delta
from llama.v1 import chat_pb2
from llama.v1.chat_pb2_grpc import ChatServiceStub
from llama.v1.sampling_pb2 import SamplingParams
from tests.e2e.proxy import proxied

THINKING = 0.1  # seconds from an answer to the next request, in the mean
WORDS = ("llama", "alpaca", "chasqui", "runs", "over", "the", "high", "bridge", "knotted", "cord")
EOF = grpc.aio.EOF
# A connection that is not shared, and one that reads little ahead of its reader.
ALONE = [("grpc.use_local_subchannel_pool", 1)]
SMALL_WINDOW = [*ALONE, ("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]

Codes = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class Caller:
    """One of the callers: its dice, and its ways to the gateway."""

    address: str
    chat: Any  # a stub, on a connection that several callers share
    dice: random.Random

    def text(self, most_words: int = 30) -> str:
        return " ".join(self.dice.choices(WORDS, k=self.dice.randint(1, most_words)))

    def sampling(self, most_tokens: int = 40, **fields: Any) -> SamplingParams:
        temperature = self.dice.choice((0.0, 0.7, 1.5))
        length = self.dice.randint(1, most_tokens)
        return SamplingParams(
            temperature=temperature, max_gen_len=length, ignore_eos=True, **fields
        )

    def dialogs(self, most: int) -> list[chat_pb2.Dialog]:
        def dialog(turns: int) -> chat_pb2.Dialog:
            roles = [chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT] * turns
            messages = [chat_pb2.Message(role=role, content=self.text(8)) for role in roles[:-1]]
            return chat_pb2.Dialog(messages=messages)

        return [dialog(self.dice.randint(1, 3)) for _ in range(self.dice.randint(1, most))]

    def chat_request(self, kind: Any, **fields: Any) -> Any:
        """A request with up to three dialogs and up to two answers each."""
        n = self.dice.randint(1, 2)
        return kind(dialogs=self.dialogs(3), n=n, sampling=self.sampling(), **fields)

    def stream_request(self, **fields: Any) -> chat_pb2.TextCompleteStreamRequest:
        """A request with one long text."""
        sampling = self.sampling(100)
        return chat_pb2.TextCompleteStreamRequest(
            prompts=[self.text()], sampling=sampling, **fields
        )


async def read(call: Any, most: int = 1_000_000) -> list[Any]:
    """So many events of a stream, or all that there are."""
    events: list[Any] = []
    while len(events) < most and (response := await call.read()) is not EOF:
        events.append(response.event)
    return events


async def asks(caller: Caller) -> None:
    request = caller.chat_request(chat_pb2.ChatCompleteRequest)
    answer = await caller.chat.ChatComplete(request)
    assert len(answer.predictions) == len(request.dialogs) * request.n


async def continues_texts(caller: Caller) -> None:
    prompts = [caller.text() for _ in range(caller.dice.randint(1, 3))]
    request = chat_pb2.TextCompleteRequest(
        prompts=prompts, n=2, echo=True, logprobs=True, top_logprobs=3, sampling=caller.sampling()
    )
    answer = await caller.chat.TextComplete(request)
    assert len(answer.predictions) == 2 * len(prompts)


async def streams(caller: Caller) -> None:
    request = caller.chat_request(chat_pb2.ChatCompleteStreamRequest)
    events = await read(caller.chat.ChatCompleteStream(request))
    assert [event.event_number for event in events] == list(range(1, len(events) + 1))
    finished = sum(event.HasField("finished") for event in events)
    assert finished == len(request.dialogs) * request.n


async def looks_around(caller: Caller) -> None:
    await caller.chat.GetModel(chat_pb2.GetModelRequest())
    [dialog] = caller.dialogs(1)
    await caller.chat.RenderPrompt(chat_pb2.RenderPromptRequest(dialog=dialog))


async def cancels_a_call(caller: Caller) -> Codes:
    call = caller.chat.ChatComplete(caller.chat_request(chat_pb2.ChatCompleteRequest))
    await asyncio.wait({asyncio.ensure_future(call.code())}, timeout=caller.dice.uniform(0, 2))
    call.cancel()
    return Codes(await call.code())


async def cancels_a_stream(caller: Caller) -> Codes:
    request = caller.chat_request(chat_pb2.ChatCompleteStreamRequest)
    call = caller.chat.ChatCompleteStream(request)
    await read(call, caller.dice.randint(0, 40))
    call.cancel()
    return Codes(await call.code())


async def has_a_deadline(caller: Caller) -> None:
    seconds = 10 ** caller.dice.uniform(-3, 0.3)
    if caller.dice.random() < 0.5:
        request = caller.chat_request(chat_pb2.ChatCompleteRequest)
        await caller.chat.ChatComplete(request, timeout=seconds)
    else:
        await read(caller.chat.TextCompleteStream(caller.stream_request(), timeout=seconds))


async def asks_wrongly(caller: Caller) -> None:
    """Breaks a rule, one of many."""
    [dialog] = caller.dialogs(1)
    wrong: dict[str, Any] = caller.dice.choice(
        [
            {"dialogs": []},
            {"dialogs": [chat_pb2.Dialog()]},
            {"dialogs": [chat_pb2.Dialog(messages=[*dialog.messages, *dialog.messages])]},
            {"dialogs": [dialog], "n": 0},
            {"dialogs": [dialog], "top_logprobs": 5},
            {"dialogs": [dialog], "sampling": SamplingParams(temperature=-1)},
            {"dialogs": [dialog], "sampling": SamplingParams(top_p=float("nan"))},
            {"dialogs": [dialog], "sampling": SamplingParams(stop=[""])},
        ]
    )
    await caller.chat.ChatComplete(chat_pb2.ChatCompleteRequest(**wrong))


async def asks_more_than_the_context(caller: Caller) -> None:
    """Found by the tokenizer only, so behind a queue that may be full."""
    dialog = _user_says("llama " * 1000)
    await caller.chat.ChatComplete(chat_pb2.ChatCompleteRequest(dialogs=[dialog]))


async def asks_for_what_is_not_there(caller: Caller) -> None:
    name = str(caller.dice.random())
    if caller.dice.random() < 0.5:
        await read(caller.chat.ResumeStream(chat_pb2.ResumeStreamRequest(stream_name=name)))
    else:
        await caller.chat.CancelStream(chat_pb2.CancelStreamRequest(stream_name=name))


async def sends_too_much(caller: Caller) -> None:
    request = chat_pb2.ChatCompleteRequest(dialogs=[_user_says("x" * 100_000)])
    await caller.chat.ChatComplete(request)


async def reads_slowly(caller: Caller) -> None:
    """Leaves a large answer alone for a while, on a connection that takes little of it ahead."""
    sampling = SamplingParams(max_gen_len=200, ignore_eos=True)
    request = chat_pb2.TextCompleteStreamRequest(
        prompts=["The"], n=4, logprobs=True, top_logprobs=20, sampling=sampling
    )
    async with grpc.aio.insecure_channel(caller.address, SMALL_WINDOW) as channel:
        call = ChatServiceStub(channel).TextCompleteStream(request)
        await read(call, 1)
        await asyncio.sleep(caller.dice.uniform(1, 5))
        await read(call)


async def vanishes(caller: Caller) -> Codes:
    """Its connection is cut, or closed, in the middle of an answer."""
    async with proxied(caller.address) as proxy:
        async with grpc.aio.insecure_channel(proxy.address, ALONE) as channel:
            call: Any = ChatServiceStub(channel).TextCompleteStream(caller.stream_request())
            await read(call, caller.dice.randint(1, 60))
            if caller.dice.random() < 0.5:
                proxy.cut()
                await read(call)
        return Codes(await call.code())


async def resumes(caller: Caller) -> None:
    """Leaves a named stream, comes back for the rest, and misses nothing."""
    name = str(uuid.UUID(int=caller.dice.getrandbits(128)))
    async with grpc.aio.insecure_channel(caller.address, ALONE) as channel:
        call = ChatServiceStub(channel).TextCompleteStream(caller.stream_request(stream_name=name))
        seen = len(await read(call, caller.dice.randint(1, 60)))
    request = chat_pb2.ResumeStreamRequest(stream_name=name, after_event_number=seen)
    rest = await read(caller.chat.ResumeStream(request))
    assert [event.event_number for event in rest] == list(range(seen + 1, seen + len(rest) + 1))
    assert not rest or rest[-1].HasField("finished")


async def resumes_by_itself(caller: Caller) -> None:
    """A reader of ours, whose connection is cut once."""
    cut_at, deltas = caller.dice.randint(1, 30), 0
    async with (
        proxied(caller.address) as proxy,
        AsyncClient(proxy.address) as client,
        aclosing(client.complete_stream(caller.text(), max_gen_len=60)) as events,
    ):
        async for event in events:
            deltas += isinstance(event, Delta)
            if deltas == cut_at:
                proxy.cut()


async def cancels_by_name(caller: Caller) -> None:
    name = str(uuid.UUID(int=caller.dice.getrandbits(128)))
    call = caller.chat.TextCompleteStream(caller.stream_request(stream_name=name))
    await read(call, caller.dice.randint(1, 60))
    await caller.chat.CancelStream(chat_pb2.CancelStreamRequest(stream_name=name))
    await read(call)


async def abandons(caller: Caller) -> Codes:
    """Never comes back for a named stream."""
    name = str(uuid.UUID(int=caller.dice.getrandbits(128)))
    call = caller.chat.TextCompleteStream(caller.stream_request(stream_name=name))
    await read(call, caller.dice.randint(0, 60))
    call.cancel()
    return Codes(await call.code())


def _user_says(text: str) -> chat_pb2.Dialog:
    return chat_pb2.Dialog(messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content=text)])


# How often each comes, and how it may end. RESOURCE_EXHAUSTED: the queue is full.
DONE = {Codes.OK, Codes.RESOURCE_EXHAUSTED}
KINDS: dict[Callable[[Caller], Awaitable[Codes | None]], tuple[int, set[Codes]]] = {
    asks: (4, DONE),
    continues_texts: (3, DONE),
    streams: (4, DONE),
    looks_around: (1, DONE),
    cancels_a_call: (3, DONE | {Codes.CANCELLED}),
    cancels_a_stream: (4, DONE | {Codes.CANCELLED}),
    has_a_deadline: (4, DONE | {Codes.DEADLINE_EXCEEDED}),
    asks_wrongly: (3, {Codes.INVALID_ARGUMENT}),
    asks_more_than_the_context: (1, {Codes.INVALID_ARGUMENT, Codes.RESOURCE_EXHAUSTED}),
    asks_for_what_is_not_there: (1, {Codes.NOT_FOUND}),
    sends_too_much: (1, {Codes.RESOURCE_EXHAUSTED}),
    reads_slowly: (2, DONE),
    vanishes: (4, DONE | {Codes.CANCELLED, Codes.UNAVAILABLE}),
    resumes: (3, DONE),
    resumes_by_itself: (2, DONE),
    cancels_by_name: (3, DONE | {Codes.CANCELLED}),
    abandons: (2, DONE | {Codes.CANCELLED}),
}


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How many visits of each kind ended how."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # ends that no caller should see

    def __str__(self) -> str:
        rows = (f"{kind:28}{dict(ends.most_common())}" for kind, ends in self.counts.items())
        return "\n".join(rows)


async def visit(caller: Caller, outcomes: Outcomes) -> None:
    """One visit of a random kind."""
    weights = [weight for weight, _ in KINDS.values()]
    [kind] = caller.dice.choices(list(KINDS), weights)
    try:
        code = await kind(caller) or Codes.OK
        details: str | None = ""
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details()
    except ChasquiError as error:
        code, details = error.code, str(error)
    too_slow = " (reads too slowly)" if "reads too slowly" in (details or "") else ""
    outcomes.counts.setdefault(kind.__name__, Counter())[code.name + too_slow] += 1
    if code not in KINDS[kind][1]:
        outcomes.wrong.append(f"{kind.__name__}: {code.name} {details}")


async def mixed_load(
    address: str, chats: Sequence[Any], callers: int, seconds: float, seed: int
) -> Outcomes:
    """So many callers for so long, each with its next visit a little after its last."""
    outcomes = Outcomes()
    end = asyncio.get_running_loop().time() + seconds

    async def visit_until_the_end(number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        caller = Caller(address, chats[number % len(chats)], dice)
        while asyncio.get_running_loop().time() < end:
            await visit(caller, outcomes)
            await asyncio.sleep(dice.expovariate(1 / THINKING))

    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(visit_until_the_end(number))
    return outcomes
