"""The same engine behind gRPC: what is left of its rate on the way through all services.

The weights are written to disk once, in Meta's format, and the model service reads them as it
would read any checkpoint: no part of production is replaced for the measurement, and the time to
load is measured as well. The other way, a service with a source of random weights of its own, would
save the writing and measure another program. Engine and services exist one after the other, as both
want the card's memory.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.checkpoint import ensure_checkpoint
from bench.engine.driver import Driver, Job, free_memory
from bench.engine.memory import read_seconds
from bench.engine.session import FIRST_ORDINARY_ID
from bench.gpu.sizes import Sizes
from bench.report import Row
from bench.service import KNOWN_PIECES, Rates, made_up_tokenizer
from bench.shapes import Shape
from bench.summary import summarize
from chasqui.cli.serve.deployment import Deployment
from chasqui.loadtest.records import Record, Success
from chasqui.loadtest.sender import Sender, clock
from chasqui.loadtest.workload import Work
from client import requests
from llama.v1 import chat_pb2
from model_service.loading.load_replica import load_replica

Call = Literal["chat", "text"]
CALLS: tuple[Call, ...] = ("chat", "text")


@dataclass(frozen=True, slots=True)
class Ground:
    """What engine and services are started from, and what the engine did with it."""

    job: Job
    ckpt_dir: Path
    tokenizer_path: Path
    engine: dict[int, list[Rates]]  # by number of streams

    def deployment(self) -> Deployment:
        """The services, with the settings that the engine had."""
        settings = self.job.replica_settings()
        return Deployment(self.ckpt_dir, self.tokenizer_path, model_settings=settings)


def with_vocabulary(shape: Shape, least: int) -> Shape:
    """The shape, or one with as many tokens as the tokenizer has pieces."""
    if shape.config.vocab_size >= least:
        return shape
    config = replace(shape.config, vocab_size=least)
    return Shape(f"{shape.name}-{least}", config)


def prepare(job: Job, sizes: Sizes, work_dir: Path) -> tuple[Ground, Row]:
    """Writes the checkpoint, loads it, and asks the engine what the services will be asked."""
    job = replace(job, shape=with_vocabulary(job.shape, KNOWN_PIECES))
    started = time.perf_counter()
    folder = ensure_checkpoint(job.shape, work_dir, job.device)
    written = time.perf_counter()
    tokenizer = work_dir / f"tokenizer-{job.shape.config.vocab_size}.model"
    tokenizer.write_bytes(made_up_tokenizer(job.shape.config.vocab_size))
    reading = read_seconds(folder)
    loading = time.perf_counter()
    driver = Driver(load_replica(job.options(folder)))
    loaded = time.perf_counter()
    rates = {count: _engine_rates(driver, count, sizes) for count in (1, sizes.streams)}
    row = Row(
        "load",
        {"shape": job.shape.name, "weights": job.dtype},
        {
            "write_seconds": written - started,
            "read_file_seconds": reading,
            "load_seconds": loaded - loading,
            "over_reading": (loaded - loading) / reading,
        },
    )
    driver.clear()
    del driver
    free_memory()
    return Ground(job, folder, tokenizer, rates), row


def _engine_rates(driver: Driver, streams: int, sizes: Sizes) -> list[Rates]:
    found = []
    for _ in range(sizes.rounds + 1):
        passage = driver.answer(driver.prompts([sizes.prompt] * streams), sizes.answer)
        found.append(Rates.of(passage.started, passage.arrivals()))
    return found[1:]


def through_services(address: str, ground: Ground, sizes: Sizes) -> Iterator[Row]:
    """The rates of ChatCompleteStream and TextCompleteStream, over the engine's."""
    for streams, direct in ground.engine.items():
        for call in CALLS:
            found = asyncio.run(_rounds(address, ground, call, streams, sizes))
            engine = summarize([rates.decode for rates in direct]).median
            overall = summarize([rates.overall for rates in direct]).median
            ratios = summarize([rates.decode / engine for rates in found])
            yield Row(
                "service",
                {"call": call, "streams": streams, "answer_tokens": sizes.answer},
                {
                    "engine_tokens_per_s": engine,
                    "service_tokens_per_s": summarize([rates.decode for rates in found]).median,
                    "ratio": ratios.median,
                    "low": ratios.low,
                    "high": ratios.high,
                    "ratio_with_prompts": summarize([r.overall / overall for r in found]).median,
                },
            )


async def _rounds(
    address: str, ground: Ground, call: Call, streams: int, sizes: Sizes
) -> list[Rates]:
    source, vocab_size = random.Random(streams), ground.job.shape.config.vocab_size
    found = []
    async with Sender(address) as sender:
        for _ in range(sizes.rounds + 1):
            works = [
                Work(number, _request(call, source, vocab_size, sizes)) for number in range(streams)
            ]
            started = clock()
            records = await asyncio.gather(*(sender.send(work, started, started) for work in works))
            found.append(Rates.of(0.0, [token_times(record) for record in records]))
    return found[1:]


def _request(
    call: Call, source: random.Random, vocab_size: int, sizes: Sizes
) -> chat_pb2.ChatCompleteStreamRequest | chat_pb2.TextCompleteStreamRequest:
    if call == "text":
        prompt = [source.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(sizes.prompt)]
        return requests.text(
            chat_pb2.TextCompleteStreamRequest,
            [prompt],
            {"temperature": 0.0, "max_gen_len": sizes.answer, "ignore_eos": True},
        )
    # Each digit is a token of its own; so the dialog is as long as the prompt, but for its tags.
    tags = min(12, sizes.prompt // 2)
    content = "".join(source.choices("0123456789", k=sizes.prompt - tags))
    return requests.chat(
        chat_pb2.ChatCompleteStreamRequest,
        [[{"role": "user", "content": content}]],
        {"temperature": 0.0, "max_gen_len": sizes.answer, "ignore_eos": True},
    )


def token_times(record: Record) -> Sequence[float]:
    """When each token of an answer came, spread evenly between the first text and the end.

    A few tokens are no text of their own, so their number is the server's; where an answer has no
    text at all, so is the time of its first token.

    Raises:
        RuntimeError: the answer failed.
    """
    if not isinstance(record.outcome, Success):
        raise RuntimeError(f"{record.outcome.status}: {record.outcome.message}")
    usage = record.outcome.usage
    waited = (usage.queue_time + usage.prefill_time).total_seconds()
    first = record.arrivals[0] if record.arrivals else record.sent + waited
    gap = (record.ended - first) / max(1, usage.completion_tokens - 1)
    return [first + number * gap for number in range(usage.completion_tokens)]
