"""Kernels that a layer of a decode step launches on CUDA, counted on the CPU."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_service.loading.distributed import initialize
from model_service.model.attention.backend import CacheShape
from model_service.model.attention.rotation import Rotary
from model_service.model.config import ModelConfig
from model_service.model.network import Step, TransformerBlock
from model_service.model.operations import FusedOperations, rotary_frequencies
from tests.model_service.conftest import CONTEXT, spread

HEADS = 8
SHAPE = CacheShape(layers=3, blocks=120, block_size=4, kv_heads=4, head_dim=8)
FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::_unsafe_view",
}  # beside views: nothing runs on the device


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types
    """The names of PyTorch's operations that run on the device, and of kernels given as such."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (self._inside or func.is_view or name in FREE):
            self.names.append(name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Counts all that happens inside as one kernel."""
        self.names.append(name)
        self._inside += 1
        yield
        self._inside -= 1

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.one(function.__name__):
                return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_layer_of_a_decode_step_launches_nine_kernels(
    backends: Any, flashinfer: Any, monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype
) -> None:
    initialize("cpu")
    config = ModelConfig(dim=64, n_layers=3, n_heads=HEADS, n_kv_heads=4, vocab_size=32)
    layer = TransformerBlock(config, 1)
    for weight in layer.parameters():
        weight.data.fill_(0.01)
    backend = backends["flashinfer"](SHAPE, HEADS, kv_dtype).fixed_batches([1], CONTEXT)[1]
    backend.plan(spread([9], [1], SHAPE, seed=1))
    launches = Launches()
    module = importlib.import_module("model_service.model.attention.flashinfer")
    for owner, name in (
        (flashinfer, "fused_add_rmsnorm"),
        (flashinfer, "silu_and_mul"),
        (flashinfer.BatchDecodeWithPagedKVCacheWrapper, "run"),
        (module, "rotate_and_write"),
    ):
        monkeypatch.setattr(owner, name, launches.counted(getattr(owner, name)))
    operations = FusedOperations(rotary_frequencies(8, CONTEXT))
    rotary = Rotary(operations.rotate, operations.rotation(torch.tensor([8])))
    x, residual = torch.randn(2, 1, config.dim)
    with torch.inference_mode(), launches:
        layer(x, residual, Step(rotary, operations, backend))
    attention = ["fused_add_rmsnorm", "linear", "rotate_and_write", "run", "linear"]
    assert launches.names == [*attention, "fused_add_rmsnorm", "linear", "silu_and_mul", "linear"]
