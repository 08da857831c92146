"""What the card does at best: its copy and read bandwidth, and its rate of matrix products.

Measured in the run that compares with them, on random data: products of zeros are faster, as they
draw less power. On the CPU the same code measures the processor, in sizes that a test affords.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.engine.roofline import Card

FP8 = torch.float8_e4m3fn
FP8_SINCE = (8, 9)  # compute capability of the first cards that multiply it


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is moved and multiplied, and how often."""

    buffer: int  # bytes; many times the card's largest cache
    matrix: int  # rows and columns
    repeats: int


EFFORTS = {"cuda": Effort(2 * 2**30, 8192, 20), "cpu": Effort(32 * 2**20, 256, 3)}


def describe(device: torch.device) -> dict[str, object]:
    """The device in words and sizes, for the result file."""
    if device.type != "cuda":
        return {"device": "cpu"}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "compute_capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def measure_card(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Card:
    """The rates of `device`; matrix products in `dtypes`, and in 8-bit floats where it has them."""
    effort = EFFORTS[device.type]
    matrix = {_name(dtype): _matrix_rate(device, effort, dtype) for dtype in dtypes}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_SINCE:
        matrix["float8"] = _float8_rate(device, effort)
    return Card(_copy_rate(device, effort), _read_rate(device, effort), matrix)


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of some runs on `device`, after three that do not count."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        return statistics.median(_host_seconds(run) for _ in range(repeats))
    pairs = [(_mark(), _mark()) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    milliseconds: list[float] = [begin.elapsed_time(end) for begin, end in pairs]
    return statistics.median(milliseconds) / 1e3


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host_seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy_rate(device: torch.device, effort: Effort) -> float:
    source = torch.ones(effort.buffer // 4, device=device)
    target = torch.empty_like(source)
    return 2 * effort.buffer / seconds(lambda: target.copy_(source), device, effort.repeats)


def _read_rate(device: torch.device, effort: Effort) -> float:
    """The faster of a sum and a product with a vector: kernels of little but reading."""
    buffer = torch.randn(effort.buffer // 4, device=device)
    matrix, vector = buffer.view(-1, 2048), torch.randn(2048, device=device)
    taken = (seconds(run, device, effort.repeats) for run in (buffer.sum, lambda: matrix @ vector))
    return effort.buffer / min(taken)


def _matrix_rate(device: torch.device, effort: Effort, dtype: torch.dtype) -> float:
    size = effort.matrix
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=product), device, effort.repeats)


def _float8_rate(device: torch.device, effort: Effort) -> float:
    """One scale for each matrix: the fastest that the card's library has."""
    size = effort.matrix
    a, b = (torch.randn(size, size, device=device).to(FP8) for _ in range(2))
    one = torch.ones((), device=device)

    def multiply() -> torch.Tensor:
        product: torch.Tensor = torch._scaled_mm(  # noqa: SLF001  # PyTorch's only 8-bit product
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product

    return 2 * size**3 / seconds(multiply, device, effort.repeats)
