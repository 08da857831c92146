"""What a model costs before and beside its steps: load time, and memory per cached token."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.engine.session import Variant, session
from bench.report import Row
from bench.shapes import Shape
from model_service.replica import load_replica

READ_BYTES = 2**24
# Allocations above this are fresh pages from the kernel, which count only once they are touched.
MMAP_BYTES = 2**25


def load_time(variant: Variant) -> Iterator[Row]:
    """Seconds to load the checkpoint, with and without verifying checksums, against reading it.

    All three find the file in the page cache if it fits: this measures the program, not the disk.
    """
    size = sum(path.stat().st_size for path in variant.ckpt_dir.glob("consolidated.*.pth"))
    read = _read_seconds(variant.ckpt_dir)
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
    """Growth of the process per token of context, against what keys and values take."""
    itemsize = {"float32": 4, "bfloat16": 2}[variant.dtype]
    process = psutil.Process()
    per_token = shape.kv_elements_per_token * itemsize
    room = max((sequences + 1) * (tokens + 4), 4 * MMAP_BYTES // per_token)
    with session(variant.options(sequences + 1, tokens + 4, room)) as run:
        run.fill(run.prompts(1, tokens), 4)  # after this, activations have their memory
        before = process.memory_info().rss
        run.fill(run.prompts(sequences, tokens), 4)
        grown = process.memory_info().rss - before
    yield Row(
        "kv_cache",
        {"precision": variant.precision, "tokens": sequences * tokens},
        {
            "bytes_per_token": grown / (sequences * tokens),
            "keys_and_values_bytes": per_token,
        },
    )


def _read_seconds(folder: Path) -> float:
    buffer = bytearray(READ_BYTES)
    started = time.perf_counter()
    for path in folder.glob("consolidated.*.pth"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started
