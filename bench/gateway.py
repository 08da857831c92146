"""Measures the cost of the gateway: python -m bench.gateway

The same prompts go to a model service directly, on one Generate stream as the gateway uses it, and
through the gateway, each on a TextCompleteStream of its own; in turn, round after round. Prompts
are token ids, so the tokenizer service has no part in it. The gateway's CPU time is what its
process used, over the tokens that passed; the latency that it adds is the difference between the
two ways' percentiles.
"""

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from bench.report import RESULTS, Row, make_report, result_folder, write_report
from bench.shapes import FIRST_ORDINARY_ID
from chasqui.cli.serve.deployment import demonstration
from chasqui.cli.serve.supervisor import in_background
from chasqui.loadtest.summary import distribution
from client.connection.channel import open_aio_channel
from llama.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, sampling_pb2

Prompts = Sequence[tuple[int, ...]]
VOCABULARY = 1920  # of the demonstration checkpoint


@dataclass(slots=True)
class Latencies:
    """Latencies of some rounds' tokens, in seconds."""

    first_token: list[float] = field(default_factory=list)
    inter_token: list[float] = field(default_factory=list)
    arrivals: int = 0

    def record(self, sent: float, arrivals: Sequence[float]) -> None:
        """One stream's: when it was asked for, and when its tokens came."""
        self.arrivals += len(arrivals)
        self.first_token.append(arrivals[0] - sent)
        self.inter_token += [b - a for a, b in itertools.pairwise(arrivals)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 96])
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {"max_batch_size": max(args.streams), "max_seq_len": args.prompt + args.answer}
    services = replace(demonstration(), model_settings={**settings, "draft_tokens": 0})
    rows = []
    with in_background(services, log=lambda _name, _line: None) as address:
        gateway = gateway_process()
        for streams in args.streams:
            rows.append(asyncio.run(_measure(gateway, address, streams, args)))
            print(rows[-1])
    report = make_report("gateway", rows, (), {"checkpoint": "demonstration"})
    result = result_folder(report, args.results)
    write_report(report, result)
    print(result / "result.md")


def gateway_process() -> psutil.Process:
    """The gateway among this process's children."""
    for child in psutil.Process().children(recursive=True):
        if "gateway" in child.cmdline():
            return child
    raise RuntimeError("no gateway runs below this process")


def model_target(gateway: psutil.Process) -> str:
    """The address of the one replica that a gateway was given."""
    flag = "--model_targets="
    return next(part.removeprefix(flag) for part in gateway.cmdline() if part.startswith(flag))


async def _measure(
    gateway: psutil.Process, address: str, streams: int, args: argparse.Namespace
) -> Row:
    source = random.Random(streams)
    direct, through, cpu = Latencies(), Latencies(), 0.0
    async with (
        open_aio_channel(address, None) as to_gateway,
        open_aio_channel(model_target(gateway), None) as to_model,
    ):
        chat = chat_pb2_grpc.ChatServiceStub(to_gateway)
        model = model_pb2_grpc.ModelServiceStub(to_model)
        for number in range(args.rounds + 1):
            prompts = [
                tuple(source.randrange(FIRST_ORDINARY_ID, VOCABULARY) for _ in range(args.prompt))
                for _ in range(streams)
            ]
            if number == 1:  # what the first round warmed up is not counted
                direct, through, cpu = Latencies(), Latencies(), 0.0
            await _through_model(model, prompts, args.answer, direct)
            before = _cpu_seconds(gateway)
            await asyncio.gather(*(_stream(chat, each, args.answer, through) for each in prompts))
            cpu += _cpu_seconds(gateway) - before
    tokens = args.rounds * streams * args.answer
    return Row(
        "gateway",
        {"streams": streams, "prompt_tokens": args.prompt, "answer_tokens": args.answer},
        {
            "cpu_us_per_token": cpu / tokens * 1e6,
            "tokens_per_message": tokens / through.arrivals,
            **_compared(direct, through),
        },
    )


def _compared(direct: Latencies, through: Latencies) -> dict[str, float]:
    pairs = {
        "first_token": (direct.first_token, through.first_token),
        "inter_token": (direct.inter_token, through.inter_token),
    }
    values = {}
    for name, samples in pairs.items():
        found = [distribution(each) for each in samples]
        for percent in (50, 99):
            ours, theirs = (each.percentile(percent) * 1e3 for each in found if each is not None)
            values[f"{name}_direct_ms_p{percent}"] = ours
            values[f"{name}_added_ms_p{percent}"] = theirs - ours
    return values


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def _through_model(
    stub: "model_pb2_grpc.ModelServiceAsyncStub",
    prompts: Prompts,
    answer: int,
    latencies: Latencies,
) -> None:
    async def starts() -> AsyncIterator[model_pb2.GenerateRequest]:
        for number, prompt in enumerate(prompts):
            yield model_pb2.GenerateRequest(
                start=model_pb2.StartSequence(
                    sequence_id=str(number), prompt_ids=prompt, sampling=_sampling(answer)
                )
            )

    sent = time.perf_counter()
    arrivals: dict[str, list[float]] = {}
    async for response in stub.Generate(starts()):
        now = time.perf_counter()
        for event in response.events:
            arrivals.setdefault(event.sequence_id, []).extend([now] * len(event.ids))
    for times in arrivals.values():
        latencies.record(sent, times)


async def _stream(
    stub: "chat_pb2_grpc.ChatServiceAsyncStub",
    prompt: tuple[int, ...],
    answer: int,
    latencies: Latencies,
) -> None:
    """One stream through the gateway. Tokens that came in one delta count once, as one arrival."""
    request = chat_pb2.TextCompleteStreamRequest(
        prompt_ids=[sampling_pb2.TokenIds(ids=prompt)], sampling=_sampling(answer)
    )
    sent = time.perf_counter()
    arrivals = [
        time.perf_counter()
        async for response in stub.TextCompleteStream(request)
        if response.event.HasField("delta")
    ]
    latencies.record(sent, arrivals)


def _sampling(answer: int) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(temperature=0, max_gen_len=answer, ignore_eos=True)


if __name__ == "__main__":
    main()
