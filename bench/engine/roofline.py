"""The roofline: what the device does at best, measured, and the least time that a step can take.

A step has to read all weights once and every cached key and value that its tokens attend to; it has
to multiply each token with every weight of the layers, and each row whose logits are wanted with
the output matrix. The larger of bytes over bandwidth and operations over the matrix rate bounds any
engine. Norms, scales, activations, the embedding's rows and what is written to the cache are left
out because they are small, so the bounds are a little lower than any engine can reach.

The rates are measured in the same run, on a shared CPU beside every measurement: such a machine is
not the same a minute later. Matrices are random: a GPU multiplies zeros faster, as they draw less
power.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch

from bench.shapes import Shape
from model_service.loading.precision import DTYPES

# Bytes of one weight of a linear layer. 4-bit codes come in groups of 32 with a scale and a zero in
# bfloat16 each; the scales of 8-bit ones, one per output, are left out.
WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "fp8": 1.0,
    "int4": 0.5 + 2 * 2 / 32,
}
# The numbers in which a product with quantized weights is computed, where they are not those of the
# activations: CUDA widens codes of 8 and 4 bits on their way and narrows activations for fp8; the
# CPU quantizes the activations of int8 and int4 layers to 8 bits.
MULTIPLIED_AS = {
    ("cuda", "fp8"): "float8",
    ("cpu", "int8"): "int8",
    ("cpu", "int4"): "int8",
}
FP8 = torch.float8_e4m3fn
FP8_SINCE = (8, 9)  # compute capability of the first GPUs that multiply it


@dataclass(frozen=True, slots=True)
class Rates:
    """The best rates of one device."""

    copy: float  # bytes per second of a copy on the device, those read and those written
    read: float  # bytes per second, read alone
    matrix: Mapping[str, float]  # operations per second of a matrix product, by type

    @property
    def bandwidth(self) -> float:
        return max(self.copy, self.read)


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one step."""

    tokens: float = 0  # that go through the layers
    logits: float = 0  # rows that go through the output matrix
    context: float = 0  # cached tokens whose keys and values are read
    pairs: float = 0  # a query with a key that it sees

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.tokens + other.tokens,
            self.logits + other.logits,
            self.context + other.context,
            self.pairs + other.pairs,
        )

    @classmethod
    def decode(cls, contexts: Iterable[int]) -> Self:
        """One token of each sequence; `contexts` are their lengths, that token included."""
        lengths = tuple(contexts)
        seen = sum(lengths)
        return cls(tokens=len(lengths), logits=len(lengths), context=seen, pairs=seen)

    @classmethod
    def prompt(cls, length: int) -> Self:
        """A whole prompt in one step, up to the logits behind its last token."""
        return cls(tokens=length, logits=1, context=length, pairs=length * (length + 1) / 2)

    @classmethod
    def part_of_prompts(cls, tokens: int, length: float) -> Self:
        """`tokens` out of prompts of `length`, each as far in as the average."""
        return cls(tokens=tokens, logits=tokens / length, pairs=tokens * (length + 1) / 2)


@dataclass(frozen=True, slots=True)
class Network:
    """A shape whose linear layers hold their weights in one format, on one kind of device."""

    shape: Shape
    precision: str  # a key of WEIGHT_BYTES
    dtype: str  # of activations
    device: str = "cuda"
    kv_bytes: int = 2  # of one number in the cache

    def weight_bytes(self) -> float:
        """Bytes of all matrices that a step with logits reads."""
        weights = self.shape.layer_parameters + self.shape.output_parameters
        return weights * WEIGHT_BYTES[self.precision]

    def bytes(self, work: Work) -> float:
        """Bytes that a step has to read."""
        per_token = self.shape.kv_elements_per_token * self.kv_bytes
        return self.weight_bytes() + work.context * per_token

    def operations(self, work: Work) -> float:
        """Additions and multiplications of a step's matrix products and attention."""
        config = self.shape.config
        layers = 2 * self.shape.layer_parameters * work.tokens
        output = 2 * self.shape.output_parameters * work.logits
        # A query's product with a key, and its share of a value, in each head.
        attention = 4 * config.n_layers * config.n_heads * config.head_dim * work.pairs
        return layers + output + attention

    def computing_seconds(self, work: Work, rates: Rates) -> float:
        """Seconds of a step's operations at the device's rate of matrix products."""
        kind = MULTIPLIED_AS.get((self.device, self.precision), self.dtype)
        return self.operations(work) / rates.matrix[kind]

    def least_seconds(self, work: Work, rates: Rates) -> float:
        """The limit of a step: reading and computing can at best go on at the same time."""
        reading = self.bytes(work) / rates.bandwidth
        return max(reading, self.computing_seconds(work, rates)) if work.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is moved and multiplied to measure a device, and how often."""

    buffer: int  # bytes; many times the largest cache
    matrix: int  # rows and columns
    repeats: int


# On the CPU about a second on two cores.
EFFORTS = {"cuda": Effort(2 * 2**30, 8192, 20), "cpu": Effort(256 * 2**20, 1536, 3)}


def measure_rates(device: torch.device, dtype: str, threads: int | None = None) -> Rates:
    """The rates of `device`: matrix products in `dtype`, and in 8 bits where it has them.

    `threads`: as many as the engine uses on the CPU; default: PyTorch's own number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    effort = EFFORTS[device.type]
    try:
        matrix = {dtype: _matrix_rate(device, effort, DTYPES[dtype])}
        if device.type == "cpu":
            matrix["int8"] = _int8_rate(effort)
        elif torch.cuda.get_device_capability(device) >= FP8_SINCE:
            matrix["float8"] = _float8_rate(device, effort)
        return Rates(_copy_rate(device, effort), _read_rate(device, effort), matrix)
    finally:
        torch.set_num_threads(before)


def fastest(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of some runs on `device`, after three that do not count."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        return min(_host_seconds(run) for _ in range(repeats))
    pairs = [(_timer(), _timer()) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    milliseconds: list[float] = [begin.elapsed_time(end) for begin, end in pairs]
    return min(milliseconds) / 1e3


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host_seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _copy_rate(device: torch.device, effort: Effort) -> float:
    source = torch.ones(effort.buffer // 4, device=device)
    target = torch.empty_like(source)
    return 2 * effort.buffer / fastest(lambda: target.copy_(source), device, effort.repeats)


def _read_rate(device: torch.device, effort: Effort) -> float:
    """The faster of a sum and a product with a vector: kernels of little but reading."""
    buffer = torch.ones(effort.buffer // 4, device=device)
    matrix, vector = buffer.view(-1, 2048), torch.ones(2048, device=device)
    taken = (fastest(run, device, effort.repeats) for run in (buffer.sum, lambda: matrix @ vector))
    return effort.buffer / min(taken)


def _matrix_rate(device: torch.device, effort: Effort, dtype: torch.dtype) -> float:
    size = effort.matrix
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / fastest(lambda: torch.mm(a, b, out=product), device, effort.repeats)


def _float8_rate(device: torch.device, effort: Effort) -> float:
    """One scale for each matrix: the fastest that the GPU's library has."""
    size = effort.matrix
    a, b = (torch.randn(size, size, device=device).to(FP8) for _ in range(2))
    one = torch.ones((), device=device)

    def multiply() -> torch.Tensor:
        product: torch.Tensor = torch._scaled_mm(  # noqa: SLF001  # PyTorch's only 8-bit product
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product

    return 2 * size**3 / fastest(multiply, device, effort.repeats)


def _int8_rate(effort: Effort) -> float:
    """The rate of PyTorch's int8 product, quantization of the activations included.

    `torch._int_mm` has no fast kernel without VNNI, this one has.
    """
    a, b = (torch.randn(effort.matrix, effort.matrix) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # deprecated, without a successor so far
        weight = torch.quantize_per_tensor(b, 1 / 32, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
    multiply = torch.ops.quantized.linear_dynamic
    taken = fastest(
        lambda: multiply(a, packed, reduce_range=False), torch.device("cpu"), effort.repeats
    )
    return 2 * effort.matrix**3 / taken
