"""A loaded replica, as one of its ranks sees it, and what it tells its callers about the model."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version

import torch

from model_service.engine.engine import Engine
from model_service.engine.limits import EngineLimits
from model_service.engine.step.runner import ModelRunner
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import Determinism, Precision
from model_service.model.config import Quantization
from model_service.model.cpu.instructions import instructions
from model_service.model.cpu.library import INTERFACE
from model_service.model.cuda import ARITHMETIC
from model_service.model.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Description of the loaded model.

    Attributes:
        fingerprint: equal only for replicas that give the same answers; empty on followers, because
            some formats are identified only by reading all weights.
    """

    name: str
    parameters: int
    vocab_size: int
    context_length: int
    shards: int
    dtype: str
    quantization: Quantization
    device: str
    fingerprint: str
    determinism: Determinism
    max_batch_size: int

    @classmethod
    def of(
        cls,
        options: ReplicaOptions,
        source: WeightSource,
        shards: int,
        precision: Precision,
        device: torch.device,
        *,
        is_leader: bool,
    ) -> "ModelInfo":
        return cls(
            name=options.model_name or options.ckpt_dir.resolve().name,
            parameters=source.config.parameters,
            vocab_size=source.config.vocab_size,
            context_length=options.max_seq_len,
            shards=shards,
            dtype=precision.dtype_name,
            quantization=precision.quantization,
            device=_device_name(device),
            fingerprint=_fingerprint(source, shards, precision, device) if is_leader else "",
            determinism=precision.determinism,
            max_batch_size=options.max_batch_size,
        )


@dataclass(frozen=True, slots=True)
class Replica:
    """One rank of a loaded replica. The leader makes the engine, the others follow its runner."""

    info: ModelInfo
    limits: EngineLimits
    runner: ModelRunner
    is_leader: bool
    draft_runner: ModelRunner | None = None  # of the draft model, on the leader

    def engine(self) -> Engine:
        return Engine(self.runner, self.limits, self.draft_runner)


def _device_name(device: torch.device) -> str:
    """The device and, on a CPU, its instructions: kernels that round differently differ here."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({instructions()})"


def _fingerprint(
    source: WeightSource, shards: int, precision: Precision, device: torch.device
) -> str:
    kernels = f"{_device_name(device)} {torch.__version__}"
    kernels += f" own kernels {INTERFACE}" if precision.uses_own_kernels else ""
    if precision.batch_invariant:
        kernels += f" invariant kernels {ARITHMETIC} of Triton {version('triton')}"
    identity = f"{source.fingerprint()} {shards} {precision} {kernels}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
