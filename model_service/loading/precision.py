"""The precision of a replica: resolves `auto` on this machine, and refuses impossible choices."""

import enum
from dataclasses import dataclass

import torch

from model_service.model.config import ModelConfig, Quantization
from model_service.model.cpu.instructions import computes_in_bfloat16
from model_service.model.cpu.kernels import kernels_for, without_kernels
from model_service.model.cuda.requirements import require_kernels, require_whole_tiles
from model_service.model.weight_sizes import weight_bytes
from model_service.model.weights.packing import shares_tied_output
from model_service.model.weights.partition import shard_parameters
from model_service.model.weights.quantization import FP8, GROUP_SIZE
from model_service.model.weights.source import WeightSource
from serving.errors import StartError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS: dict[str, Quantization] = {
    "none": "none",
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8",
}
# Below this many weights a shard's step is over sooner than a second thread wakes up, and on a busy
# machine threads wait for each other at every layer.
SMALL_MODEL = 20_000_000
# Requirements of CUDA kernels for quantized weights: types of activations, the lowest compute
# capability, and the divisors of the inputs and outputs of a shard's matrices.
_CUDA_ACTIVATIONS: dict[Quantization, tuple[str, ...]] = {
    "int8": ("float16", "bfloat16"),
    "int4": ("bfloat16",),
    "fp8": ("bfloat16",),
}
_CUDA_CAPABILITY: dict[Quantization, tuple[int, int]] = {
    "int8": (8, 0),
    "int4": (8, 0),
    "fp8": (8, 9),
}
_MULTIPLES: dict[tuple[str, Quantization], tuple[int, int]] = {
    ("cpu", "int4"): (GROUP_SIZE, 1),
    ("cuda", "int4"): (GROUP_SIZE, 8),
    ("cuda", "fp8"): (16, 16),
}


class Determinism(enum.Enum):
    """Conditions for an exact replay, as the contract's `Determinism` explains them."""

    SEEDED = enum.auto()
    BATCH_INVARIANT = enum.auto()


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtype of activations, how the linear layers hold their weights, how the cache its keys
    and values, and whether CUDA computes by the kernels that are batch-invariant.
    """

    device_type: str
    dtype: torch.dtype
    quantization: Quantization
    kv_dtype: torch.dtype
    batch_invariant: bool = False

    def __str__(self) -> str:
        more = "" if self.kv_dtype == self.dtype else ", fp8 cache"
        more += ", batch-invariant" if self.batch_invariant else ""
        if self.quantization == "none":
            return self.dtype_name + more
        return f"{self.quantization} ({self.dtype_name}{more})"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def read_dtype(self, source: WeightSource) -> torch.dtype:
        """The type in which weights are read, before they are packed.

        Weights that will be quantized are read without a loss: as they are stored if all are
        bfloat16, which the CPU quantizes as it is, else as float32.
        """
        if self.quantization == "none":
            return self.dtype
        stored = {source.stored_dtype(name) for name in source.config.parameter_shapes()}
        as_stored = self.device_type == "cpu" and stored == {torch.bfloat16}
        return torch.bfloat16 if as_stored else torch.float32

    @property
    def determinism(self) -> Determinism:
        """BATCH_INVARIANT where all kernels sum in one order for any number of rows.

        PyTorch's do so in no type, FlashInfer's neither. float32 logits differ by some 1e-6, which
        moves the borders between tokens by as little, so a replay differs in one token of many
        thousands; it is no guarantee. The number of shards does not matter (`cpu/shard_sum.py`).
        """
        invariant = self.uses_own_kernels or self.batch_invariant
        return Determinism.BATCH_INVARIANT if invariant else Determinism.SEEDED

    @property
    def uses_own_kernels(self) -> bool:
        """Whether activations are computed by the CPU kernels that this package compiles."""
        return kernels_for(self.dtype, torch.device(self.device_type)) is not None

    def shard_bytes(self, source: WeightSource, shards: int) -> int:
        """Memory for the weights of one of `shards` ranks."""
        linear = shard_parameters(source.config, shards, linear=True)
        others = shard_parameters(source.config, shards, linear=False)
        config, kind = source.config, self.device_type
        if not self.batch_invariant and shares_tied_output(
            config, shards, self.quantization, self.dtype, kind
        ):
            linear -= config.vocab_size * config.dim
        of_linear = weight_bytes(self.quantization, self.dtype.itemsize, self.device_type)
        return round(linear * of_linear + others * self.dtype.itemsize)

    def check(self, config: ModelConfig, shards: int) -> None:
        """Raises StartError when the matrices of a shard cannot be quantized so."""
        of_inputs, of_outputs = _MULTIPLES.get((self.device_type, self.quantization), (1, 1))
        heads = config.n_heads * config.head_dim // shards
        hidden = config.hidden_dim // shards
        inputs = {"dim": config.dim, "hidden_dim": hidden, "heads": heads}
        outputs = {
            "dim": config.dim,
            "hidden_dim": 2 * hidden,
            "heads": heads + 2 * config.kv_heads * config.head_dim // shards,
            "vocab_size": config.vocab_size // shards,
        }
        uneven = [f"{name} {length}" for name, length in inputs.items() if length % of_inputs]
        if uneven and self.quantization == "int4":
            raise StartError(
                f"int4 weights share a scale among {GROUP_SIZE} neighbours of a row, which does "
                f"not divide {', '.join(uneven)} of a shard: use --quantize int8, or fewer shards"
            )
        if self.batch_invariant:
            require_whole_tiles(inputs)
        uneven += [f"{name} {length}" for name, length in outputs.items() if length % of_outputs]
        if uneven:
            raise StartError(
                f"{self.quantization} matrices on CUDA consist of tiles of {of_inputs} inputs and "
                f"{of_outputs} outputs, which do not divide {', '.join(uneven)} of a shard: use "
                "--quantize int8, or fewer shards"
            )


def choose_device(device: str) -> str:
    """`auto` resolved to cuda or cpu.

    Raises:
        StartError: cuda is asked for and not there.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise StartError(
            "--device cuda, but PyTorch finds no CUDA device: check the driver with nvidia-smi and "
            "that this is PyTorch's CUDA build, or use --device cpu"
        )
    return ("cuda" if available else "cpu") if device == "auto" else device


def choose_precision(
    device: torch.device,
    dtype: str,
    quantization: str,
    kv_cache_dtype: str,
    *,
    small: bool,
    batch_invariant: bool = False,
) -> Precision:
    """`auto` resolved for `device`; a `small` model gains nothing by bfloat16 on the CPU.

    Raises:
        StartError: the device does not compute so.
    """
    chosen = QUANTIZATIONS[quantization]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = cuda_dtype(dtype, chosen, capability)
    else:
        name = _cpu_dtype(dtype, chosen, small=small)
    own = DTYPES[name]
    if batch_invariant:
        _check_batch_invariance(device, own)
    return Precision(
        device.type,
        own,
        chosen,
        FP8 if kv_cache_dtype == "fp8" else own,
        batch_invariant=batch_invariant and device.type == "cuda",
    )


def _check_batch_invariance(device: torch.device, dtype: torch.dtype) -> None:
    """Raises StartError if no kernels here are batch-invariant in `dtype`."""
    if device.type == "cuda":
        require_kernels(torch.cuda.get_device_capability(device))
    elif kernels_for(dtype, device) is None:
        raise StartError(
            "--batch_invariant: only the kernels that are compiled when this package is installed "
            f"are batch-invariant on the CPU, and they do not serve here: {without_kernels()}. To "
            "fix: install the package where there is a C++ compiler, or leave the flag out"
        )


def cuda_dtype(dtype: str, quantization: Quantization, capability: tuple[int, int]) -> str:
    """`auto` resolved on a GPU of this compute capability: float16, as in Meta's code, where the
    kernels take it.

    Raises:
        StartError: no kernel there computes so.
    """
    if quantization == "none":
        return "float16" if dtype == "auto" else dtype
    least = _CUDA_CAPABILITY[quantization]
    if capability < least:
        raise StartError(
            f"{quantization} weights need a GPU of compute capability {least[0]}.{least[1]} or "
            f"newer, this one has {capability[0]}.{capability[1]}: use "
            f"--quantize {'int8' if capability >= _CUDA_CAPABILITY['int8'] else 'none'}"
        )
    allowed = _CUDA_ACTIVATIONS[quantization]
    if dtype == "auto":
        return allowed[0]
    if dtype not in allowed:
        raise StartError(
            f"on CUDA, {quantization} weights are multiplied by activations in "
            f"{' or '.join(allowed)}, not {dtype}: use --dtype {allowed[-1]}, or auto"
        )
    return dtype


def _cpu_dtype(dtype: str, quantization: Quantization, *, small: bool) -> str:
    if dtype == "float16":
        raise StartError("--dtype float16 needs --device cuda; on the CPU use bfloat16 or float32")
    if dtype != "auto":
        return dtype
    # The 8-bit kernel takes and gives float32.
    exact = small or quantization != "none" or not computes_in_bfloat16()
    return "float32" if exact else "bfloat16"
