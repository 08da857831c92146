"""In which numbers a replica computes: what `auto` means on this machine, and what does not go."""

from dataclasses import dataclass
from typing import Protocol

import torch

from model_service.model.config import ModelConfig
from model_service.model.quantization import GROUP_SIZE, Quantization
from model_service.model.weights import computes_in_bfloat16, weight_bytes
from serving.errors import StartError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS: dict[str, Quantization] = {"none": "none", "int8": "int8", "int4": "int4"}


class Counted(Protocol):
    """Weights of which a rank's number is known."""

    def shard_parameters(self, shards: int, *, linear: bool | None = None) -> int: ...


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The dtype of activations and cache, and how the linear layers hold their weights."""

    dtype: torch.dtype
    quantization: Quantization

    def __str__(self) -> str:
        if self.quantization == "none":
            return self.dtype_name
        return f"{self.quantization} ({self.dtype_name})"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def shard_bytes(self, checkpoint: Counted, shards: int) -> int:
        """Memory for the weights of one of `shards` ranks."""
        linear = checkpoint.shard_parameters(shards, linear=True)
        others = checkpoint.shard_parameters(shards, linear=False)
        return round(
            linear * weight_bytes(self.quantization, self.dtype) + others * self.dtype.itemsize
        )

    def check(self, config: ModelConfig, shards: int) -> None:
        """Raises StartError when the rows of a shard's weights cannot be quantized so."""
        if self.quantization != "int4":
            return
        rows = {
            "dim": config.dim,
            "hidden_dim": config.hidden_dim // shards,
            "heads": config.n_heads * config.head_dim // shards,
        }
        uneven = [f"{name} {length}" for name, length in rows.items() if length % GROUP_SIZE]
        if uneven:
            raise StartError(
                f"int4 weights share a scale among {GROUP_SIZE} neighbours of a row, which does "
                f"not divide {', '.join(uneven)} of a shard: use --quantize int8, or fewer shards"
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


def choose_arithmetic(
    device_type: str, dtype: str, quantization: str, *, small: bool
) -> Arithmetic:
    """`auto` resolved, for a device of `device_type`; a `small` model gains nothing by bfloat16.

    Raises:
        StartError: the device does not compute so.
    """
    chosen = QUANTIZATIONS[quantization]
    if device_type == "cpu" and dtype == "float16":
        raise StartError("--dtype float16 needs --device cuda; on the CPU use bfloat16 or float32")
    if device_type == "cuda" and chosen != "none":
        raise StartError(
            f"{chosen} weights are computed on the CPU only: use --quantize none, or --device cpu"
        )
    if dtype != "auto":
        return Arithmetic(DTYPES[dtype], chosen)
    if device_type == "cuda":
        return Arithmetic(torch.float16, chosen)
    # The 8-bit kernel takes and gives float32.
    exact = small or chosen != "none" or not computes_in_bfloat16()
    return Arithmetic(torch.float32 if exact else torch.bfloat16, chosen)
