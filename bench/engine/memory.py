"""The cost of a model before and beside its steps: time and memory of loading, and of the cache."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.engine.driver import Driver, Job, Load, in_own_process, loaded
from bench.engine.roofline import measure_read
from bench.report import Row, SkippedError, spread

READ_BYTES = 2**24
_SAMPLE_SECONDS = 0.005


@dataclass(slots=True)
class Cost:
    """The cost of one piece of work; memory is anonymous, and beyond that before the work.

    Attributes:
        seconds: each part's time, by name.
        cpu_seconds: of all threads of this process.
        peak: most bytes while it went on.
        kept: bytes at its end.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    peak: int = 0
    kept: int = 0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Samples this process's memory without the pages of files."""
        process, done = psutil.Process(), threading.Event()

        def anonymous() -> int:
            memory = process.memory_info()
            return int(memory.rss - memory.shared)

        before = anonymous()

        def watch() -> None:
            while not done.wait(_SAMPLE_SECONDS):
                self.peak = max(self.peak, anonymous() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.kept = anonymous() - before
            self.peak = max(self.peak, self.kept)


@dataclass(frozen=True, slots=True)
class Loading:
    """A replica that was loaded in a process of its own, and its first steps."""

    cost: Cost
    step_seconds: list[float]
    share_of_read_bandwidth: float


def load_time(job: Job, load: Load, rounds: int) -> Iterator[Row]:
    """The checkpoint is loaded as the service does, checksums included, and decodes `load`.

    Reading the file finds it in the page cache, if it fits beside the process.
    """
    if job.ckpt_dir is None:
        raise SkippedError("there is no checkpoint")
    sized = job.sized(load.streams, load.prompt + load.answer, verify_checkpoint=True)
    readings, loadings = [], []
    for _ in range(rounds):
        reading, size = read_checkpoint(job.ckpt_dir)
        readings.append(reading)
        loadings.append(in_own_process(_load, sized, load))
    seconds = [each.cost.total for each in loadings]
    steps = [1e3 * taken for each in loadings for taken in each.step_seconds]
    yield Row(
        "load",
        {"weights": job.weights},
        {
            **spread("seconds", seconds),
            "gb_per_s": size / statistics.median(seconds) / 1e9,
            "read_file_seconds": statistics.median(readings),
            "over_reading": statistics.median(seconds) / statistics.median(readings),
            "peak_gb": max(each.cost.peak for each in loadings) / 1e9,
            "kept_gb": max(each.cost.kept for each in loadings) / 1e9,
            **spread("step_ms", steps),
            "share_of_read_bandwidth": statistics.median(
                each.share_of_read_bandwidth for each in loadings
            ),
        },
    )


def _load(job: Job, load: Load) -> Loading:
    cost = Cost()
    with cost.memory(), cost.part("load"):
        replica = job.load()
    driver = Driver(replica)
    driver.answer_load(load)  # pays for what later ones find ready
    read, trial = measure_read(job.device), driver.answer_load(load)
    share = trial.decode_bandwidth(job.network) / read
    return Loading(cost, trial.seconds()[trial.all_decode()], share)


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
