"""What the machine can do at best: bytes read per second, and multiplications per second.

Decode reads every weight once per step and prefill multiplies with every weight once per token, so
these two rates bound any engine. Measured beside the engine each time, since a shared machine is
not the same machine a minute later.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

BUFFER_BYTES = 256 * 2**20  # many times any last-level cache of a core's share
GEMM_SIZE = 1536
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of this machine now."""

    read: float  # bytes per second, from memory
    gemm: dict[str, float]  # multiply-adds × 2 per second, by type

    def decode_step(self, weight_bytes: int) -> float:
        """Fewest seconds in which a step reads the weights."""
        return weight_bytes / self.read

    def prefill(self, parameters: int, tokens: int, dtype: str) -> float:
        """Fewest seconds in which `tokens` are multiplied with `parameters` weights."""
        return 2 * parameters * tokens / self.gemm[dtype]


def measure_limits(*, bfloat16: bool, threads: int) -> Limits:
    """Best of a few repetitions each; takes about a second on two cores.

    Args:
        bfloat16: whether the hardware multiplies bfloat16; emulated rates would mean nothing.
        threads: as the engine uses.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm = {"float32": _gemm_rate(torch.float32)}
        if bfloat16:
            gemm["bfloat16"] = _gemm_rate(torch.bfloat16)
        gemm["int8"] = _int8_rate()
        return Limits(_read_rate(), gemm)
    finally:
        torch.set_num_threads(before)


def _read_rate() -> float:
    buffer = torch.ones(BUFFER_BYTES // 4)
    matrix = buffer.view(-1, 2048)
    vector = torch.ones(2048)
    # Which of the two comes nearer to the memory depends on the BLAS; the better is the limit.
    return BUFFER_BYTES / min(_best(buffer.sum), _best(lambda: matrix @ vector))


def _gemm_rate(dtype: torch.dtype) -> float:
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
    return 2 * GEMM_SIZE**3 / _best(lambda: a @ a)


def _int8_rate() -> float:
    """Rate of PyTorch's int8 GEMM, quantization of the activations included.

    `torch._int_mm` has no fast kernel without VNNI, this one has.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # deprecated, without a successor so far
        weight = torch.quantize_per_tensor(
            torch.randn(GEMM_SIZE, GEMM_SIZE), 1 / 32, 0, torch.qint8
        )
        packed = torch.ops.quantized.linear_prepack(weight, None)
    a = torch.randn(GEMM_SIZE, GEMM_SIZE)
    multiply = torch.ops.quantized.linear_dynamic
    return 2 * GEMM_SIZE**3 / _best(lambda: multiply(a, packed, reduce_range=False))


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
