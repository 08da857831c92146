"""What a model costs before and beside its steps: load time, and memory per cached token."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.engine.session import Variant, session
from bench.report import Row
from bench.shapes import Shape
from model_service.loading.load_replica import load_replica

READ_BYTES = 2**24
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class _Full:
    """A process with a full engine."""

    resident: int  # bytes
    capacity: int  # tokens of the cache


def load_time(variant: Variant) -> Iterator[Row]:
    """Seconds to load the checkpoint, with and without verifying checksums, against reading it.

    All three find the file in the page cache if it fits: this measures the program, not the disk.
    """
    size = sum(path.stat().st_size for path in variant.ckpt_dir.glob("consolidated.*.pth"))
    read = read_seconds(variant.ckpt_dir)
    for verify in (True, False):
        options = dataclasses.replace(variant.options(1, 64), verify_checkpoint=verify)
        started = time.perf_counter()
        load_replica(options)
        seconds = time.perf_counter() - started
        yield Row(
            "load",
            {"precision": variant.precision, "verify_checkpoint": verify},
            {
                "seconds": seconds,
                "gb_per_s": size / seconds / 1e9,
                "read_file_seconds": read,
                "over_reading": seconds / read,
            },
        )


def cache_memory(shape: Shape, variant: Variant, sequences: int, tokens: int) -> Iterator[Row]:
    """Memory of the process per token of its cache, against what keys and values take.

    The difference between an engine that is full with `sequences` prompts and one that is full with
    one, each in a process of its own: allocators keep what an earlier engine had.
    """
    small, large = (_full_engine(variant, count, tokens) for count in (1, sequences))
    room = large.capacity - small.capacity
    yield Row(
        "kv_cache",
        {"precision": variant.precision, "tokens": room},
        {
            "bytes_per_token": (large.resident - small.resident) / room,
            "keys_and_values_bytes": shape.kv_elements_per_token * ITEMSIZE[variant.dtype],
        },
    )


def _full_engine(variant: Variant, sequences: int, tokens: int) -> "_Full":
    """What a process takes whose engine holds so many prompts.

    Raises:
        RuntimeError: the process failed; the message is its output.
    """
    command = [sys.executable, "-m", "bench.engine.memory", str(variant.ckpt_dir), variant.dtype]
    command += [variant.quantize or "", str(sequences), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return _Full(*map(int, done.stdout.split()))


def read_seconds(folder: Path) -> float:
    buffer = bytearray(READ_BYTES)
    started = time.perf_counter()
    for path in folder.glob("consolidated.*.pth"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def main() -> None:
    """Fills an engine; prints the resident bytes of this process and the tokens of its cache."""
    ckpt_dir, dtype, quantize, sequences, tokens = sys.argv[1:]
    variant = Variant(Path(ckpt_dir), dtype, quantize=quantize or None)
    count, length = int(sequences), int(tokens)
    answer = 4 * count + 4  # the first is to run until the last has come
    with session(variant.options(count, length + answer, count * (length + answer))) as run:
        for prompt in run.prompts(count, length):
            run.fill([prompt], answer)  # one by one: activations are the same for any number
        capacity = run.engine.limits.blocks * run.engine.limits.block_size
        print(psutil.Process().memory_info().rss, capacity)


if __name__ == "__main__":
    main()
