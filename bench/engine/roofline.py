"""The roofline: the rates of the device, measured, and the least time that a step can take.

Norms, scales, activations, the embedding's rows and what is written to the cache are left out
because they are small, so the bounds are a little lower than any engine can reach. Matrices are
random: a GPU multiplies zeros faster, as they draw less power.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Self

import torch
from torch.utils.benchmark import Timer

from bench.shapes import Shape
from model_service.loading.precision import DTYPES

# Bytes of one weight of a linear layer. 4-bit codes come in groups of 64 with a scale and a zero in
# bfloat16 each; the scales of 8-bit ones, one per output, are left out.
WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "fp8": 1.0,
    "int4": 0.5 + 2 * 2 / 64,
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
        pairs = zip(astuple(self), astuple(other), strict=True)
        return type(self)(*(ours + theirs for ours, theirs in pairs))

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
    """How much is moved and multiplied to measure a device, and for how long."""

    buffer: int  # bytes; many times the largest cache
    matrix: int  # rows and columns
    seconds: float  # of each measurement


EFFORTS = {"cuda": Effort(2 * 2**30, 8192, 0.05), "cpu": Effort(256 * 2**20, 1536, 0.2)}


def measure_rates(device: torch.device, dtype: str) -> Rates:
    """The rates of `device`: matrix products in `dtype`, and in 8 bits where it has them."""
    effort = EFFORTS[device.type]
    source = torch.ones(effort.buffer // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * effort.buffer / _fastest(lambda: target.copy_(source), effort)
    products = _products(device, dtype, effort.matrix)
    operations = 2 * effort.matrix**3
    matrix = {name: operations / _fastest(run, effort) for name, run in products.items()}
    return Rates(copy, measure_read(device), matrix)


def measure_read(device: torch.device) -> float:
    """Bytes per second that kernels of little but reading reach: a sum, a matrix by a vector."""
    effort = EFFORTS[device.type]
    matrix = torch.ones(effort.buffer // 4, device=device).view(-1, 2048)
    vector = torch.ones(2048, device=device)
    return effort.buffer / min(
        _fastest(matrix.sum, effort), _fastest(lambda: matrix @ vector, effort)
    )


def _fastest(run: Callable[[], object], effort: Effort) -> float:
    """Seconds of the fastest of some runs on the device."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=effort.seconds).times)


def _products(device: torch.device, dtype: str, size: int) -> dict[str, Callable[[], object]]:
    """Matrix products of `size` rows and columns, by the type of their numbers."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    wide_a, wide_b = a.to(DTYPES[dtype]), b.to(DTYPES[dtype])
    products: dict[str, Callable[[], object]] = {dtype: lambda: wide_a @ wide_b}
    if device.type == "cpu":
        # `torch._int_mm` has no fast kernel without VNNI. This one has; it quantizes `a`, too.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # deprecated, without a successor so far
            weight = torch.quantize_per_tensor(b, 1 / 32, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(weight, None)
        multiply = torch.ops.quantized.linear_dynamic
        products["int8"] = lambda: multiply(a, packed, reduce_range=False)
    elif torch.cuda.get_device_capability(device) >= FP8_SINCE:
        # One scale for each matrix: the fastest that the GPU's library has.
        narrow_a, narrow_b, one = a.to(FP8), b.to(FP8).t(), torch.ones((), device=device)
        products["float8"] = lambda: torch._scaled_mm(  # noqa: SLF001  # PyTorch's only 8-bit product
            narrow_a,
            narrow_b,
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return products
