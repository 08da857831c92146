"""What the way through gRPC costs: python -m bench.service

The same prompts go to an engine in a process of its own and, through the gateway's
TextCompleteStream, to services on the same machine; in turn, round after round. Only one of the two
exists at a time: a second set of weights in memory slows the first. Compared are tokens per second
while all streams decode, and answer tokens over the time from the first request to the last token.
The second has the prompts in it, which an engine takes in one step when all are there at once, and
bit by bit when they arrive one after the other.
"""

import argparse
import asyncio
import multiprocessing
import random
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.checkpoint import ensure_checkpoint
from bench.engine.session import FIRST_ORDINARY_ID, Session, Variant, session
from bench.report import RESULTS, Row, make_report, result_folder, write_report
from bench.shapes import SHAPES
from bench.summary import summarize
from chasqui.cli.serve.deployment import Deployment
from chasqui.cli.serve.supervisor import in_background
from client.connection.channel import open_aio_channel
from demo.checkpoint import CHECKPOINT, TOKENIZER
from llama.v1 import chat_pb2, chat_pb2_grpc, sampling_pb2

Prompts = Sequence[tuple[int, ...]]
KNOWN_PIECES = 1920  # of the demonstration's tokenizer


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of some streams."""

    decode: float  # while all of them decode
    overall: float  # from the first request to the last token

    @classmethod
    def of(cls, started: float, arrivals: Sequence[Sequence[float]]) -> Self:
        """`arrivals` holds the time of each token, by stream."""
        begin = max(times[0] for times in arrivals)
        end = min(times[-1] for times in arrivals)
        if begin >= end:
            raise RuntimeError("the streams never decoded all at once: ask for longer answers")
        amid = sum(begin < time <= end for times in arrivals for time in times)
        last = max(times[-1] for times in arrivals)
        return cls(amid / (end - begin), sum(map(len, arrivals)) / (last - started))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--quantize", choices=["none", "int8", "int4"], default="int8")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work_dir", type=Path, default=Path.home() / ".cache/chasqui-bench")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    folder = ensure_checkpoint(shape, args.work_dir)
    tokenizer = args.work_dir / f"tokenizer-{shape.config.vocab_size}.model"
    tokenizer.write_bytes(made_up_tokenizer(shape.config.vocab_size))
    length, most = args.prompt + args.answer, max(args.streams)
    # On the CPU `auto` may be bfloat16; both sides get the same.
    variant = Variant(folder, "float32", None, None if args.quantize == "none" else args.quantize)
    services = Deployment(
        folder,
        tokenizer,
        model_settings={
            "max_seq_len": length,
            "max_batch_size": most,
            "quantize": args.quantize,
            "dtype": "float32",
            "draft_tokens": 0,
        },
    )
    source = random.Random(0)
    prompts = [
        _prompts(source, each, args.prompt, shape.config.vocab_size) for each in args.streams
    ]
    engine: list[list[Rates]] = []
    service: list[list[Rates]] = []
    for number in range(args.rounds):
        engine.append(in_a_process(variant, prompts, args.answer))
        with in_background(services, log=lambda _name, _line: None) as address:
            service.append(asyncio.run(_through_grpc(address, prompts, args.answer)))
        print(f"round {number + 1}: engine {engine[-1]}, service {service[-1]}", flush=True)
    rows = [
        _compared(streams, args, [each[i] for each in engine], [each[i] for each in service])
        for i, streams in enumerate(args.streams)
    ]
    report = make_report("service", rows, (), {"shape": args.shape, "quantize": args.quantize})
    result = result_folder(report, args.results) / args.shape
    write_report(report, result)
    print(*rows, result / "result.md", sep="\n")


def made_up_tokenizer(vocab_size: int) -> bytes:
    """The demonstration's tokenizer with pieces without meaning added up to `vocab_size`.

    A SentencePiece file is a protocol buffer whose pieces are a repeated field, and what is put
    behind such a message is appended to its repeated fields.
    """
    model = bytearray((CHECKPOINT / TOKENIZER).read_bytes())
    for number in range(KNOWN_PIECES, vocab_size):
        text = f"▁made{number}".encode()
        piece = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e6)
        model += b"\n" + bytes([len(piece)]) + piece
    return bytes(model)


def _prompts(source: random.Random, count: int, length: int, vocab_size: int) -> Prompts:
    return [
        tuple(source.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(length))
        for _ in range(count)
    ]


def _compared(
    streams: int, args: argparse.Namespace, engine: Sequence[Rates], service: Sequence[Rates]
) -> Row:
    rounds = list(zip(engine, service, strict=True))
    ratios = summarize([b.decode / a.decode for a, b in rounds])
    return Row(
        "service",
        {"streams": streams, "prompt_tokens": args.prompt, "answer_tokens": args.answer},
        {
            "engine_tokens_per_s": summarize([a.decode for a in engine]).median,
            "service_tokens_per_s": summarize([b.decode for b in service]).median,
            "ratio": ratios.median,
            "low": ratios.low,
            "high": ratios.high,
            "ratio_with_prompts": summarize([b.overall / a.overall for a, b in rounds]).median,
        },
    )


def in_a_process(variant: Variant, prompts: Sequence[Prompts], answer: int) -> list[Rates]:
    """`through_engine` in a process that ends with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(through_engine, variant, prompts, answer).result()


def through_engine(variant: Variant, prompts: Sequence[Prompts], answer: int) -> list[Rates]:
    """The rates of each group of prompts, after one uncounted pass of all."""
    most, length = max(map(len, prompts)), len(prompts[0][0]) + answer
    with session(variant.options(most, length)) as direct:
        for each in prompts:
            _through_session(direct, each, answer)
        return [_through_session(direct, each, answer) for each in prompts]


def _through_session(direct: Session, prompts: Prompts, answer: int) -> Rates:
    started = time.perf_counter()
    arrivals: dict[int, list[float]] = {
        direct.add(prompt, answer, logprobs=True): [] for prompt in prompts
    }
    while direct.engine.has_work:
        step = direct.step()
        now = time.perf_counter()
        for request, tokens in step.tokens.items():
            arrivals[request] += [now] * tokens
    return Rates.of(started, [*arrivals.values()])


async def _through_grpc(address: str, prompts: Sequence[Prompts], answer: int) -> list[Rates]:
    """As `through_engine`, each prompt on a stream of its own."""
    async with open_aio_channel(address, None) as channel:
        await channel.channel_ready()
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        for each in prompts:
            await _through_streams(stub, each, answer)
        return [await _through_streams(stub, each, answer) for each in prompts]


async def _through_streams(
    stub: "chat_pb2_grpc.ChatServiceAsyncStub", prompts: Prompts, answer: int
) -> Rates:
    started = time.perf_counter()
    arrivals = await asyncio.gather(*(_stream(stub, prompt, answer) for prompt in prompts))
    if {len(times) for times in arrivals} != {answer}:
        raise RuntimeError(f"answers of other lengths than {answer} tokens")
    return Rates.of(started, arrivals)


async def _stream(
    stub: "chat_pb2_grpc.ChatServiceAsyncStub", prompt: tuple[int, ...], answer: int
) -> list[float]:
    """When each token arrived; they are counted by their logprobs, as some are no text."""
    request = chat_pb2.TextCompleteStreamRequest(
        prompt_ids=[sampling_pb2.TokenIds(ids=prompt)],
        sampling=sampling_pb2.SamplingParams(temperature=0, max_gen_len=answer, ignore_eos=True),
        logprobs=True,
    )
    arrivals: list[float] = []
    async for response in stub.TextCompleteStream(request):
        arrivals += [time.perf_counter()] * len(response.event.delta.tokens)
    return arrivals


if __name__ == "__main__":
    main()
