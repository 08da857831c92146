"""The cost of a model before and beside its steps: load time, and memory per cached token."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.engine.driver import Job, in_own_process, loaded
from bench.report import Row, SkippedError

READ_BYTES = 2**24


def load_time(job: Job) -> Iterator[Row]:
    """Seconds to load the checkpoint, with and without verifying checksums, against reading it.

    All three find the file in the page cache if it fits: this measures the program, not the disk.
    """
    if job.ckpt_dir is None:
        raise SkippedError("there is no checkpoint")
    reading, size = read_checkpoint(job.ckpt_dir)
    for verify in (True, False):
        started = time.perf_counter()
        job.with_settings(verify_checkpoint=verify).load()
        seconds = time.perf_counter() - started
        yield Row(
            "load",
            {"weights": job.weights, "verify_checkpoint": verify},
            {
                "seconds": seconds,
                "gb_per_s": size / seconds / 1e9,
                "read_file_seconds": reading,
                "over_reading": seconds / reading,
            },
        )


def read_checkpoint(folder: Path) -> tuple[float, int]:
    """Seconds to read the weight files, and their bytes."""
    buffer, size = bytearray(READ_BYTES), 0
    started = time.perf_counter()
    for path in folder.glob("consolidated.*.pth"):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return time.perf_counter() - started, size


def cache_memory(job: Job, sequences: int, tokens: int) -> Iterator[Row]:
    """Memory of the process per token of its cache, against the size of its keys and values.

    The difference between an engine that is full with `sequences` prompts and one that is full with
    one. The excess over keys and values is copies that attention makes.
    """
    if job.device.type != "cpu":
        raise SkippedError("measures the memory of the process: --device cpu")
    (small, fewer), (large, more) = (
        in_own_process(full_engine, job, count, tokens) for count in (1, sequences)
    )
    yield Row(
        "kv_cache",
        {"weights": job.weights, "tokens": more - fewer},
        {
            "bytes_per_token": (large - small) / (more - fewer),
            "keys_and_values_bytes": job.shape.kv_elements_per_token * job.network.kv_bytes,
        },
    )


def full_engine(job: Job, sequences: int, tokens: int) -> tuple[int, int]:
    """Fills an engine. Returns the resident bytes of this process and the tokens of its cache."""
    answer = 4 * sequences + 4  # the first is to run until the last has come
    with loaded(job.sized(sequences, tokens + answer)) as driver:
        for prompt in driver.prompts([tokens] * sequences):
            driver.fill([prompt], [answer])  # one by one: activations are the same for any number
        capacity = driver.engine.limits.blocks * driver.engine.limits.block_size
        return psutil.Process().memory_info().rss, capacity
