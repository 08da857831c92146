"""The cost of loading a checkpoint in each format, beside reading its bytes.

Loading is what the model service does before its first step, except for the cache: it opens and
verifies the files, reads the weights, packs them for the processor and computes the fingerprint.
Each measurement has a process of its own, and finds the files in the page cache if they fit.
"""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench.baselines.exports import ensure_model, model_bytes
from bench.checkpoint import CPU, ensure_checkpoint
from bench.engine.driver import in_own_process
from bench.engine.memory import READ_BYTES, Cost
from bench.report import Recorder, Row, command_parser, finish, read_host, spread
from bench.shapes import SHAPES
from model_service.loading import distributed
from model_service.loading.precision import choose_precision
from model_service.model.load_network import load_network
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.packing import packing
from model_service.model.weights.source import Shard

FORMATS = ("meta", "hf", "F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K")


def load(path: Path, dtype: str) -> tuple[Cost, int]:
    """Loads the weights at `path`. Returns the cost, and the bytes that they must take."""
    distributed.initialize("cpu")
    precision = choose_precision(CPU, dtype, "none", "auto", small=False)
    pack = packing("none", precision.dtype, CPU)
    cost = Cost()
    with cost.memory():
        with cost.part("open"):
            source = open_weights(path)
        with cost.part("weights"):
            read_shard = partial(source.read_shard, Shard(0, 1, precision.read_dtype(source), CPU))
            network = load_network(
                source.config, 512, read_shard, pack=pack, dtype=precision.dtype, device=CPU
            )
        with cost.part("fingerprint"):
            source.fingerprint()
        del network
    return cost, precision.shard_bytes(source, 1)


def read(path: Path) -> Cost:
    """Reads the files at `path` into one small buffer, once before the time counts."""
    cost, buffer = Cost(), bytearray(READ_BYTES)
    _read(path, buffer)
    with cost.part("read"):
        _read(path, buffer)
    return cost


def _read(path: Path, buffer: bytearray) -> None:
    for each in [path] if path.is_file() else [*path.glob("*.pth"), *path.glob("*.safetensors")]:
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write(size: int) -> Cost:
    """Fills `size` bytes of new memory, which no form of loading can do without."""
    cost = Cost()
    with cost.part("write"):
        pieces = [torch.zeros(READ_BYTES, dtype=torch.uint8) for _ in range(size // READ_BYTES)]
    del pieces
    return cost


def measure(paths: dict[str, Path], dtype: str, rounds: int) -> Iterator[Row]:
    """A row for each format, all formats in turn in each round."""
    loads: dict[str, list[Cost]] = {name: [] for name in paths}
    reads: dict[str, list[Cost]] = {name: [] for name in paths}
    writes: dict[str, list[Cost]] = {name: [] for name in paths}
    needed: dict[str, int] = {}
    for _ in range(rounds):
        for name, path in paths.items():
            reads[name].append(in_own_process(read, path))
            cost, needed[name] = in_own_process(load, path, dtype)
            loads[name].append(cost)
            writes[name].append(in_own_process(write, needed[name]))
    for name, path in paths.items():
        totals = [cost.total for cost in loads[name]]
        reading = [cost.total for cost in reads[name]]
        parts = {
            f"{part}_seconds": statistics.median(cost.seconds[part] for cost in loads[name])
            for part in loads[name][0].seconds
        }
        memory = statistics.median(cost.peak for cost in loads[name])
        yield Row(
            "loading",
            {"format": name, "dtype": dtype, "file_gb": model_bytes(path) / 1e9},
            {
                **spread("over_reading", [a / b for a, b in zip(totals, reading, strict=True)]),
                "seconds": statistics.median(totals),
                **parts,
                "read_seconds": statistics.median(reading),
                "write_seconds": statistics.median(cost.total for cost in writes[name]),
                "cpu_seconds": statistics.median(cost.cpu_seconds for cost in loads[name]),
                "read_cpu_seconds": statistics.median(cost.cpu_seconds for cost in reads[name]),
                "write_cpu_seconds": statistics.median(cost.cpu_seconds for cost in writes[name]),
                "peak_gb": memory / 1e9,
                "peak_over_weights": memory / needed[name],
            },
        )


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    shape, host = SHAPES[args.shape], read_host()
    checkpoint = ensure_checkpoint(shape, args.work_dir)
    recorder = Recorder("baselines.loading", args.results, {"shape": shape.name}, args.shape, host)
    paths = {name: ensure_model(name, checkpoint, args.work_dir) for name in args.formats}
    recorder.attempt("loading", lambda: measure(paths, host.wide_dtype, args.rounds))
    finish(recorder)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("baselines.loading", __doc__, default_device="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
