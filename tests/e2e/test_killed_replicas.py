"""Streams of every sampling mode whose replicas are killed, in each precision.

The tokens of a batch-invariant replica are those of an undisturbed run, with their logprobs to the
last bit. For others, the number of streams that differ is printed at the end of the test run.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import pytest

from llama.v1.chat_pb2 import TextCompleteStreamRequest
from llama.v1.sampling_pb2 import DETERMINISM_BATCH_INVARIANT, SamplingParams, TokenIds
from tests.e2e.deployments import Fleet
from tests.e2e.kills import busiest, until_failover
from tests.e2e.processes import ServiceProcess
from tests.e2e.streams import Answer, Streams

pytestmark = pytest.mark.alone

LENGTH = 200
PROMPTS = 3  # of each mode
# Tokens that a replica makes, for all its streams together, before it is killed: of some 3,000.
KILLED_AT = (100, 500, 1000)
# Precision, shards, kills.
RUNS = [
    *(("bfloat16", 1, 1), ("int8", 1, 1), ("bfloat16", 2, 1)),
    *(
        pytest.param(precision, 1, 3, marks=pytest.mark.thorough)
        for precision in ("float32", "bfloat16", "int8", "int4")
    ),
]
# Fields of SamplingParams, then others of the request.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0}, {}),
    "temperature": ({"temperature": 1, "top_p": 1}, {}),
    "top_p": ({"temperature": 1, "top_p": 0.8}, {}),
    "top_k": ({"temperature": 1.3, "top_p": 1, "top_k": 20}, {}),
    "min_p": ({"temperature": 1.3, "top_p": 1, "min_p": 0.02}, {}),
    "penalties": (
        {
            "temperature": 1,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.2,
        },
        {},
    ),
    "logit_bias": ({"temperature": 1, "logit_bias": {5: 4.0, 300: -100.0}}, {}),
    "logprobs": ({"temperature": 0.8}, {"top_logprobs": 5, "logprob_token_ids": [7, 8]}),
    "choices": ({"temperature": 1}, {"n": 3}),
}


def requests() -> list[TextCompleteStreamRequest]:
    """Half of the answers are long because EOS does not end them, half because it is not drawn."""
    made = []
    for mode, (sampling, others) in enumerate(MODES.values()):
        for number in range(PROMPTS):
            prompt = [1, *(3 + (mode * 31 + number * 7 + i * 5) % 500 for i in range(8 + 5 * mode))]
            forced = {"ignore_eos": True} if number % 2 else {"min_gen_len": LENGTH}
            params = SamplingParams(**sampling, **forced, max_gen_len=LENGTH, seed=number)
            ids = [TokenIds(ids=prompt)]
            made.append(
                TextCompleteStreamRequest(prompt_ids=ids, sampling=params, logprobs=True, **others)
            )
    return made


def kill(replica: ServiceProcess, shards: int) -> None:
    if shards == 1:
        replica.kill()
    else:
        replica.send(signal.SIGKILL, rank=shards - 1)
        replica.wait()


async def with_kills(
    fleet: Fleet, back: ExitStack, shards: int, kills: int
) -> AsyncIterator[list[Answer]]:
    """The answers of a run for each kill of a replica in its middle, which is started again."""

    async def attempt(tokens: int) -> list[Answer]:
        await asyncio.to_thread(fleet.wait_for_replicas, len(fleet.models))
        streams = Streams(fleet.gateway.address, requests())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(streams.run())
            victim = await busiest(fleet.models, tokens)
            await asyncio.to_thread(kill, fleet.models[victim], shards)
            fleet.models[victim] = back.enter_context(fleet.models[victim].again())
        return streams.answers

    for tokens in KILLED_AT[:kills]:
        yield await until_failover(fleet, partial(attempt, tokens))


@pytest.mark.parametrize(
    ("precision", "shards", "kills"),
    RUNS,
)
async def test_tokens_are_those_of_an_undisturbed_run(
    fleet: Callable[..., AbstractContextManager[Any]],
    record_property: Callable[[str, object], None],
    precision: str,
    shards: int,
    kills: int,
) -> None:
    flags = {"quantize" if precision.startswith("int") else "dtype": precision}
    # Groups of int4 do not divide the rows of the other checkpoint.
    checkpoint = "mha-mp1" if precision == "int4" else "gqa-mp1"
    settings = {"replicas": 2, "shards": shards, "model_flags": flags, "checkpoint": checkpoint}
    with ExitStack() as back:
        running = back.enter_context(fleet(**settings))
        undisturbed = Streams(running.gateway.address, requests())
        await undisturbed.run()
        runs = [answers async for answers in with_kills(running, back, shards, kills)]
    expected = undisturbed.answers
    assert {len(answer.tokens) for answer in expected} == {LENGTH}
    pairs = [pair for answers in runs for pair in zip(answers, expected, strict=True)]
    if expected[0].started.determinism == DETERMINISM_BATCH_INVARIANT:
        assert all(answer.tokens == other.tokens for answer, other in pairs)
    differ = sum(answer.ids != other.ids for answer, other in pairs)
    replicas = f"{precision}, {shards} shard{'s' * (shards > 1)}"
    found = f"{replicas}: {differ} of {len(pairs)} streams differ after kills"
    record_property("measured", found)
