"""The memory that a model needs on this machine, in each precision. Imports no PyTorch."""

import shutil
import subprocess
from dataclasses import dataclass

from model_service.loading.host_memory import WORKING_MEMORY, free_host_memory
from model_service.model.config import ModelConfig, Quantization
from model_service.model.weight_sizes import weight_bytes
from model_service.model.weights.partition import shard_parameters

_SMI = ("nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
_SMI_SECONDS = 10.0
# The forms that the model service can hold weights in: name, quantization, bytes of an activation.
_FORMS: dict[str, tuple[tuple[str, Quantization, int], ...]] = {
    "cpu": (
        ("float32", "none", 4),
        ("bfloat16", "none", 2),
        ("int8", "int8", 4),
        ("int4", "int4", 4),
    ),
    "cuda": (
        ("float16", "none", 2),
        ("int8", "int8", 2),
        ("fp8", "fp8", 2),
        ("int4", "int4", 2),
    ),
}


@dataclass(frozen=True, slots=True)
class Device:
    """A device with memory for a model.

    Attributes:
        kind: cpu or cuda.
        name: for people.
        free: bytes.
    """

    kind: str
    name: str
    free: int


@dataclass(frozen=True, slots=True)
class Need:
    """The memory for one precision, in bytes: weights, one full sequence in the cache, and a step.

    Attributes:
        precision: as --dtype or --quantize name it.
        weights: of all shards together.
        cache: keys and values of `context` tokens.
        context: tokens.
        fits: whether the device has that much free.
    """

    precision: str
    weights: int
    cache: int
    context: int
    fits: bool


def needs(config: ModelConfig, device: Device, context: int) -> list[Need]:
    """The memory of the model in one shard on `device`, for a context of `context` tokens."""
    linear = shard_parameters(config, 1, linear=True)
    others = shard_parameters(config, 1, linear=False)
    found = []
    for precision, quantization, itemsize in _FORMS[device.kind]:
        # A tied output matrix is in memory once where kernels read it as it is.
        shared = config.tied_embeddings and quantization == "none" and device.kind == "cuda"
        own = linear - config.vocab_size * config.dim if shared else linear
        weights = round(own * weight_bytes(quantization, itemsize, device.kind))
        weights += others * itemsize
        cache = cache_bytes(config, itemsize) * context
        fits = weights + cache + WORKING_MEMORY <= device.free
        found.append(Need(precision, weights, cache, context, fits))
    return found


def cache_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes that the keys and values of one token take."""
    return 2 * config.n_layers * config.kv_heads * config.head_dim * itemsize


def devices() -> list[Device]:
    """The GPU with most free memory, if NVIDIA's driver names one, and the processor."""
    found = [Device("cpu", "CPU", free_host_memory())]
    gpus = _gpus()
    return [max(gpus, key=lambda gpu: gpu.free), *found] if gpus else found


def _gpus() -> list[Device]:
    if shutil.which(_SMI[0]) is None:
        return []
    try:
        done = subprocess.run(  # noqa: S603  # a fixed command
            _SMI, capture_output=True, text=True, check=True, timeout=_SMI_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.rpartition(",") for line in done.stdout.splitlines())
    return [
        Device("cuda", name.strip(), int(free) * 2**20)
        for name, _, free in rows
        if free.strip().isdigit()
    ]
