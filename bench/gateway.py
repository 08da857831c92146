"""The cost of the gateway: its CPU time per token and per request, over gRPC and over HTTP, and the
latency that it adds.

The same prompts, as ids, go to a model service directly, on one Generate stream as the gateway uses
it, and through the gateway, each on a TextCompleteStream of its own; in turn, round after round.
The latency that the gateway adds is the difference between the two ways' percentiles.

The cost over each protocol is measured with long answers and with answers of one token, in turn:
the CPU time that one more token takes is the cost per token, and what is left of an answer of one
token is the cost per request.
"""

import argparse
import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace

import httpx2
import psutil

from bench.report import Recorder, Row, command_parser, finish
from bench.shapes import random_prompts
from chasqui.cli.serve.deployment import demonstration
from chasqui.cli.serve.service_log import http_address
from chasqui.cli.serve.supervisor import in_background
from chasqui.loadtest.records import Failure, Record
from chasqui.loadtest.sender import Sender, clock
from chasqui.loadtest.summary import distribution
from chasqui.loadtest.workload import Work
from client.connection.channel import open_aio_channel
from llama.v1 import model_pb2, model_pb2_grpc
from llama.v1.chat_pb2 import ChatCompleteStreamRequest, TextCompleteStreamRequest
from llama.v1.sampling_pb2 import SamplingParams, TokenIds

VOCABULARY = 1920  # of the demonstration checkpoint

Request = TextCompleteStreamRequest | ChatCompleteStreamRequest
Prompts = Sequence[Sequence[int]]
Arrivals = list[float]  # of one stream's tokens: seconds since it was asked for


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("gateway", __doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 96])
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--requests", type=int, default=192, help="of one token, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    recorder = Recorder("gateway", args.results, {"checkpoint": "demonstration"})
    recorder.attempt("gateway", lambda: measure(args))
    finish(recorder)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Two rows for each number of streams: the gateway's cost, and that of each protocol."""
    settings = {"max_batch_size": max(args.streams), "max_seq_len": args.prompt + args.answer}
    model_settings = {**settings, "draft_tokens": 0}
    services = replace(demonstration(), model_settings=model_settings, http_port=None)
    http: list[str] = []

    def log(_name: str, line: str) -> None:
        if address := http_address(line):
            http.append(f"http://{address}")

    with in_background(services, log) as address:
        for streams in args.streams:
            yield asyncio.run(_compare(gateway_process(), address, streams, args))
            yield asyncio.run(
                _compare_protocols(gateway_process(), address, http[0], streams, args)
            )


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


async def _compare(
    gateway: psutil.Process, address: str, streams: int, args: argparse.Namespace
) -> Row:
    direct: list[Arrivals] = []
    through: list[Arrivals] = []
    cpu = 0.0
    async with Sender(address) as sender, open_aio_channel(model_target(gateway), None) as channel:
        model = model_pb2_grpc.ModelServiceStub(channel)
        for number in range(args.rounds + 1):
            prompts = random_prompts(streams, args.prompt, VOCABULARY, seed=number)
            to_model = await _through_model(model, prompts, args.answer)
            before = _cpu_seconds(gateway)
            records = await ask(sender, [text_request(each, args.answer) for each in prompts])
            if number:  # what the first round warmed up is not counted
                cpu += _cpu_seconds(gateway) - before
                direct += to_model
                through += ([at - each.sent for at in each.arrivals] for each in records)
    tokens = args.rounds * streams * args.answer
    return Row(
        "gateway",
        {"streams": streams, "prompt_tokens": args.prompt, "answer_tokens": args.answer},
        {
            "cpu_us_per_token": cpu / tokens * 1e6,
            "tokens_per_message": tokens / sum(map(len, through)),
            **_added(
                "first_token", *([each[0] for each in way if each] for way in (direct, through))
            ),
            **_added("inter_token", *(_gaps(way) for way in (direct, through))),
        },
    )


async def _compare_protocols(
    gateway: psutil.Process, address: str, http_url: str, streams: int, args: argparse.Namespace
) -> Row:
    """CPU microseconds of the gateway, for a token more and for a request without its token."""
    seconds: dict[tuple[str, int], float] = defaultdict(float)  # of all requests of a length
    counts = {args.answer: streams, 1: max(streams, args.requests)}
    limits = httpx2.Limits(max_connections=streams)
    async with (
        Sender(address) as sender,
        httpx2.AsyncClient(base_url=http_url, timeout=None, limits=limits) as http,
    ):

        async def over_grpc(prompts: Prompts, answer: int) -> None:
            await ask(sender, [text_request(each, answer) for each in prompts])

        async def over_http(prompts: Prompts, answer: int) -> None:
            await asyncio.gather(*(_read(http, each, answer) for each in prompts))

        for number, (answer, count) in itertools.product(range(args.rounds + 1), counts.items()):
            prompts = random_prompts(count, args.prompt, VOCABULARY, seed=number)
            ways = {"grpc": over_grpc, "http": over_http}
            for protocol in sorted(ways, reverse=bool(number % 2)):
                before = _cpu_seconds(gateway)
                for begin in range(0, count, streams):
                    await ways[protocol](prompts[begin : begin + streams], answer)
                if number:  # what the first round warmed up is not counted
                    seconds[protocol, answer] += _cpu_seconds(gateway) - before
    costs = {
        (protocol, answer): spent / counts[answer] / args.rounds * 1e6
        for (protocol, answer), spent in seconds.items()
    }
    settings = {"streams": streams, "prompt_tokens": args.prompt, "answer_tokens": args.answer}
    return Row("protocols", settings, _per_token_and_request(costs, args.answer))


def _per_token_and_request(
    costs: Mapping[tuple[str, int], float], length: int
) -> dict[str, float | None]:
    """From the costs of requests by protocol and length of answer: one token, and `length`.

    A ratio is None where the run was too short for the process clock, which counts in 10 ms.
    """
    values, ratios = {}, dict[str, float | None]()
    for protocol in ("grpc", "http"):
        per_token = (costs[protocol, length] - costs[protocol, 1]) / (length - 1)
        values[f"{protocol}_cpu_us_per_token"] = per_token
        values[f"{protocol}_cpu_us_per_request"] = costs[protocol, 1] - per_token
    for each in ("token", "request"):
        http, grpc = (values[f"{protocol}_cpu_us_per_{each}"] for protocol in ("http", "grpc"))
        ratios[f"ratio_per_{each}"] = http / grpc if grpc > 0 else None
    return {**values, **ratios}


async def _read(http: httpx2.AsyncClient, prompt: Sequence[int], answer: int) -> None:
    """Reads a stream over HTTP to its end; RuntimeError if it failed."""
    body = {"prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True}
    last = ""
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            last = line or last
    if last != "data: [DONE]":
        raise RuntimeError(f"{response.status_code}: {last}")


def _gaps(streams: Sequence[Arrivals]) -> list[float]:
    return [b - a for arrivals in streams for a, b in itertools.pairwise(arrivals)]


def _added(name: str, direct: Sequence[float], through: Sequence[float]) -> dict[str, float]:
    """Percentiles of the direct way, and what the gateway adds to them."""
    values = {}
    found = [distribution(each) for each in (direct, through)]
    for percent in (50, 99):
        model, gateway = (each.percentile(percent) * 1e3 for each in found if each is not None)
        values[f"{name}_direct_ms_p{percent}"] = model
        values[f"{name}_added_ms_p{percent}"] = gateway - model
    return values


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def _through_model(
    stub: "model_pb2_grpc.ModelServiceAsyncStub", prompts: Sequence[Sequence[int]], answer: int
) -> list[Arrivals]:
    async def starts() -> AsyncIterator[model_pb2.GenerateRequest]:
        for number, prompt in enumerate(prompts):
            yield model_pb2.GenerateRequest(
                start=model_pb2.StartSequence(
                    sequence_id=str(number), prompt_ids=prompt, sampling=greedy(answer)
                )
            )

    sent = clock()
    arrivals: dict[str, Arrivals] = {}
    async for response in stub.Generate(starts()):
        now = clock() - sent
        for event in response.events:
            arrivals.setdefault(event.sequence_id, []).extend([now] * len(event.ids))
    return [*arrivals.values()]


async def ask(sender: Sender, requests: Sequence[Request]) -> list[Record]:
    """All requests at once, each on a stream; times by `clock`. RuntimeError: one failed.

    Tokens that came in one delta are one arrival.
    """
    works = (Work(number, request) for number, request in enumerate(requests))
    records = await asyncio.gather(*(sender.send(each, clock(), origin=0.0) for each in works))
    for record in records:
        if isinstance(record.outcome, Failure):
            raise RuntimeError(f"{record.outcome.status}: {record.outcome.message}")
    return records


def text_request(prompt: Sequence[int], answer: int) -> TextCompleteStreamRequest:
    return TextCompleteStreamRequest(prompt_ids=[TokenIds(ids=prompt)], sampling=greedy(answer))


def greedy(answer: int) -> SamplingParams:
    """For an answer of exactly so many tokens."""
    return SamplingParams(temperature=0, max_gen_len=answer, ignore_eos=True)


if __name__ == "__main__":
    main()
