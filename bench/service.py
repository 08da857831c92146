"""The cost of the way through gRPC.

The same requests go to an engine in a process of its own and, through the gateway, to services on
the same machine; in turn, and only one of the two exists at a time, because a second set of weights
in memory slows the first. Two rates are compared: tokens per second while all streams decode, and
answer tokens from the first request to the last token. The second includes the prompts, which an
engine computes in one step when all are there at once, and in parts when they arrive one by one.
"""

import argparse
import asyncio
import json
import statistics
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.checkpoint import ensure_checkpoint
from bench.engine.driver import QUANTIZED, Job, Load, in_own_process, loaded
from bench.gateway import Request, ask, greedy, text_request
from bench.report import Recorder, Row, Value, command_parser, finish, read_host, spread
from bench.shapes import SHAPES, Shape, random_prompts
from chasqui.cli.main import main as chasqui
from chasqui.cli.serve.deployment import Deployment
from chasqui.cli.serve.supervisor import in_background
from chasqui.loadtest.sender import Sender, clock
from demo.checkpoint import CHECKPOINT, TOKENIZER
from llama.v1.chat_pb2 import ChatCompleteStreamRequest, Dialog, Message, Role

KNOWN_PIECES = 1920  # of the demonstration's tokenizer
PROMPT_TAGS = 12  # tokens of a dialog's format around its one message
CONNECTIONS = 4  # of the load generator, which share the streams
LATENCIES = ("time_to_first_token_ms", "inter_token_latency_ms", "end_to_end_latency_ms")


@dataclass(frozen=True, slots=True)
class Answer:
    """When the first and the last of an answer's tokens came, by time.perf_counter."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of some streams."""

    decode: float  # while all of them decode
    overall: float  # from the first request to the last token


def rates(started: float, answers: Sequence[Answer]) -> Rates:
    """The tokens of an answer are spread evenly between its first and its last.

    Raises:
        RuntimeError: there was no time at which all streams decoded.
    """
    begin, end = max(each.first for each in answers), min(each.last for each in answers)
    if begin >= end:
        raise RuntimeError("the streams never decoded all at once: ask for longer answers")
    per_second = sum((each.tokens - 1) / (each.last - each.first) for each in answers)
    last = max(each.last for each in answers)
    return Rates(per_second, sum(each.tokens for each in answers) / (last - started))


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    device, host = torch.device(args.device), read_host(args.device)
    shape = with_vocabulary(SHAPES[args.shape], KNOWN_PIECES)
    job = Job(
        shape,
        host.wide_dtype,
        device,
        step_tokens=2048,
        precision=None if args.quantize == "none" else args.quantize,
        ckpt_dir=ensure_checkpoint(shape, args.work_dir, device),
    ).sized(max(args.streams), args.prompt + args.answer)
    tokenizer = args.work_dir / f"tokenizer-{shape.config.vocab_size}.model"
    tokenizer.write_bytes(made_up_tokenizer(shape.config.vocab_size))
    details = {"shape": shape.name, "weights": job.weights}
    recorder = Recorder("service", args.results, details, args.shape, host)
    recorder.attempt("service", lambda: compare(job, tokenizer, args))
    finish(recorder)


def compare(job: Job, tokenizer: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Engine and services in turn, then the services under load."""
    services = Deployment(job.ckpt_dir or Path(), tokenizer, model_settings=job.replica_settings())
    found: dict[tuple[str, int], list[tuple[list[Rates], list[Rates]]]] = {}
    load: list[Row] = []
    for number in range(args.rounds):
        engine = in_own_process(
            engine_rates, job, args.streams, args.prompt, args.answer, args.trials
        )
        with in_background(services, log=lambda _name, _line: None) as address:
            for call in args.calls:
                for streams, direct in zip(args.streams, engine, strict=True):
                    through = asyncio.run(service_rates(address, call, streams, job, args))
                    found.setdefault((call, streams), []).append((direct, through))
            if number == args.rounds - 1 and args.shares:
                load = list(under_load(address, job.sequences, args))
    lengths = {"prompt_tokens": args.prompt, "answer_tokens": args.answer}
    for (call, streams), rounds in found.items():
        yield Row("service", {"call": call, "streams": streams, **lengths}, _compared(rounds))
    yield from load


def _compared(rounds: Sequence[tuple[list[Rates], list[Rates]]]) -> dict[str, Value]:
    """Each of the services' trials over the engine's median of the same round."""
    decode, overall = [], []
    for engine, service in rounds:
        decode += [each.decode / statistics.median(e.decode for e in engine) for each in service]
        overall += [each.overall / statistics.median(e.overall for e in engine) for each in service]
    medians = [
        statistics.median(each.decode for pair in rounds for each in pair[side]) for side in (0, 1)
    ]
    return {
        "engine_tokens_per_s": medians[0],
        "service_tokens_per_s": medians[1],
        **spread("ratio", decode),
        "ratio_with_prompts": statistics.median(overall),
    }


def engine_rates(
    job: Job, streams: Sequence[int], prompt: int, answer: int, trials: int
) -> list[list[Rates]]:
    """The rates of each number of streams, after one trial that does not count."""
    found = []
    with loaded(job) as driver:
        for count in streams:
            rated = []
            for _ in range(trials + 1):
                trial = driver.answer_load(Load(count, prompt, answer))
                times = [Answer(each[0], each[-1], len(each)) for each in trial.arrivals()]
                rated.append(rates(trial.started, times))
            found.append(rated[1:])
    return found


async def service_rates(
    address: str, call: str, streams: int, job: Job, args: argparse.Namespace
) -> list[Rates]:
    """As `engine_rates`, for one number of streams, each prompt on a stream of its own."""
    request, found = CALLS[call], []
    async with Sender(address) as sender:
        for number in range(args.trials + 1):
            prompts = random_prompts(streams, args.prompt, job.shape.config.vocab_size, number)
            requests = [request(prompt, args.answer) for prompt in prompts]
            started = clock()
            records = await ask(sender, requests)
            # A few tokens are no text of their own, so the server counts them.
            answers = [Answer(r.arrivals[0], r.ended, r.completion_tokens) for r in records]
            if any(each.tokens != args.answer for each in answers):
                raise RuntimeError(f"an answer of another length than {args.answer} tokens")
            found.append(rates(started, answers))
    return found[1:]


def chat_request(prompt: Sequence[int], answer: int) -> ChatCompleteStreamRequest:
    """A dialog with about as many tokens: each digit is one of its own."""
    digits = "".join(str(token % 10) for token in prompt[PROMPT_TAGS:]) or "0"
    dialog = Dialog(messages=[Message(role=Role.ROLE_USER, content=digits)])
    return ChatCompleteStreamRequest(dialogs=[dialog], sampling=greedy(answer))


CALLS: Mapping[str, Callable[[Sequence[int], int], Request]] = {
    "text": text_request,
    "chat": chat_request,
}


def under_load(address: str, at_once: int, args: argparse.Namespace) -> Iterator[Row]:
    """Throughput and latencies at capacity, and at each share of it: `chasqui bench`."""
    full = _load(address, ["--concurrency", str(at_once)], args)
    yield _load_row("capacity", full)
    for share in args.shares:
        rate = share * full["requests_per_second"]
        yield _load_row(f"{share:.0%}", _load(address, ["--rate", str(rate)], args))


def _load(address: str, loop: list[str], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "load.json"
        lengths = ["--prompt_tokens", args.load_prompts, "--answer_tokens", args.load_answers]
        ends = [f"--duration={args.load_seconds}", f"--connections={CONNECTIONS}"]
        command = ["bench", "--target", address, *loop, *lengths, *ends, "--json", str(file)]
        chasqui(command, standalone_mode=False)
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["summary"]
        return summary


def _load_row(load: str, summary: dict[str, Any]) -> Row:
    names = ("requests_per_second", "output_tokens_per_second", "failed")
    values: dict[str, Value] = {name: summary[name] for name in names}
    for name in LATENCIES:
        if found := summary[name]:
            values |= {f"{name}_{each}": found[each] for each in ("p50", "p95", "p99")}
    return Row("under load", {"load": load}, values)


def with_vocabulary(shape: Shape, least: int) -> Shape:
    """The shape, or one with as many tokens as the tokenizer has pieces."""
    if shape.config.vocab_size >= least:
        return shape
    return Shape(f"{shape.name}-{least}", replace(shape.config, vocab_size=least))


def made_up_tokenizer(vocab_size: int) -> bytes:
    """The demonstration's tokenizer with pieces without meaning added up to `vocab_size`.

    A SentencePiece file is a protocol buffer whose pieces are a repeated field, and bytes behind
    such a message are appended to its repeated fields.
    """
    model = bytearray((CHECKPOINT / TOKENIZER).read_bytes())
    for number in range(KNOWN_PIECES, vocab_size):
        text = f"▁made{number}".encode()
        piece = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e6)
        model += b"\n" + bytes([len(piece)]) + piece
    return bytes(model)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("service", __doc__, default_device="cpu")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1.1B")
    add("--quantize", choices=["none", *QUANTIZED], default="int8")
    add("--streams", type=int, nargs="+", default=[1, 8])
    add("--prompt", type=int, default=32, help="tokens")
    add("--answer", type=int, default=128, help="tokens")
    add("--calls", nargs="+", choices=CALLS, default=["text"], help="RPCs to measure")
    add("--rounds", type=int, default=5, help="starts of engine and services")
    add("--trials", type=int, default=1, help="measurements after each start")
    add("--shares", type=float, nargs="+", default=[], help="loads in parts of the capacity")
    add("--load_seconds", type=float, default=15.0, help="duration of each load")
    add("--load_prompts", default="lognormal:200,0.6", help="lengths under load")
    add("--load_answers", default="lognormal:100,0.6", help="lengths under load")
    return parser


if __name__ == "__main__":
    main()
