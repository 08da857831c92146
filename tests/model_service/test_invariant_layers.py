"""The mode that is batch-invariant on CUDA as a whole, in Triton's interpreter: a network in it
computes what the CPU computes, in six kernels a layer that read each weight, key and value once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_service.loading import distributed
from model_service.model.attention.backend import CacheShape, SequenceSpan
from model_service.model.attention.select import make_attention
from model_service.model.graphs.piecewise_graphs import PiecewiseGraphs
from model_service.model.load_network import load_network
from model_service.model.network import Transformer
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.packing import packing
from model_service.model.weights.source import Shard
from tests.model_service.conftest import CPU, spread
from tests.model_service.recorders import TapeRecorder
from tests.model_service.test_launches import Launches

triton: Any = pytest.importorskip("triton", reason="Triton is not installed")
interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
attention: Any = pytest.importorskip("model_service.model.cuda.attention")
split_attention: Any = pytest.importorskip("model_service.model.attention.split_attention")
layers: Any = pytest.importorskip("model_service.model.cuda.layers")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="kernels run on the GPU here, or the interpreter is older than NumPy's newest",
)
LENGTHS = (1, 4)
TOKENS = torch.randint(3, 250, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def network_of(golden: Path, batch_invariant: bool) -> tuple[Transformer, CacheShape, int]:
    """One on the CPU, by Triton's kernels if batch-invariant; a cache for it, and query heads."""
    distributed.initialize("cpu")
    source = open_weights(golden / "checkpoints" / "mha-mp1")
    config = source.config
    network = load_network(
        config,
        64,
        partial(source.read_shard, Shard(0, 1, torch.float32, CPU)),
        pack=packing("none", torch.float32, CPU, batch_invariant=batch_invariant),
        dtype=torch.float32,
        device=CPU,
        batch_invariant=batch_invariant,
    )
    return (
        network,
        CacheShape(config.n_layers, 40, 4, config.kv_heads, config.head_dim),
        config.n_heads,
    )


def two_steps(golden: Path, batch_invariant: bool) -> torch.Tensor:
    """Logits of two prompts in one step, and of one more token of each in the next."""
    network, shape, heads = network_of(golden, batch_invariant)
    float32 = torch.float32
    backend = make_attention(
        shape,
        float32,
        CPU,
        float32,
        heads=heads,
        max_batch_size=4,
        batch_invariant=batch_invariant,
    )
    spans = spread([length + 1 for length in LENGTHS], LENGTHS, shape, seed=3)
    prompts = [SequenceSpan(n, n, span.block_table) for n, span in zip(LENGTHS, spans, strict=True)]
    backend.plan(prompts)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    first = network(TOKENS, positions, None, backend)
    backend.plan([SequenceSpan(1, span.context_length, span.block_table) for span in spans])
    second = network(TOKENS[:2], torch.tensor(LENGTHS), None, backend)
    return torch.cat((first, second))


def test_a_network_computes_what_the_cpu_computes_in_float32(golden: Path) -> None:
    expected, found = (two_steps(golden, batch_invariant) for batch_invariant in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_mixed_step_in_pieces_has_the_same_bits(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, shape, heads = network_of(golden, batch_invariant=True)
    recorder, launch = TapeRecorder(), interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda *args, **kwargs: recorder.call(launch, *args, **kwargs),
    )
    spans = spread([6, 4], [1, 4], shape, seed=3)
    positions = torch.tensor([5, 0, 1, 2, 3])
    plainly, in_pieces = (
        split_attention.SplitAttention(shape, CPU, torch.float32, heads=heads) for _ in "ab"
    )
    graphs = PiecewiseGraphs(network, in_pieces, max_step_tokens=16, device=CPU, record=recorder)
    for cache in (plainly._kernels.cache, in_pieces._kernels.cache):
        for each in (cache._keys, cache._values):
            each.normal_(generator=torch.Generator().manual_seed(1))
    plainly.plan(spans)
    expected = network(TOKENS, positions, None, plainly)
    found = graphs.forward(spans, TOKENS, positions, torch.arange(5))
    assert found is not None
    assert torch.equal(found, expected)
    for name in ("_keys", "_values"):
        written, exact = (getattr(each._kernels.cache, name) for each in (in_pieces, plainly))
        assert torch.equal(written[:, 1:], exact[:, 1:])


class Loads:
    """The bytes that programs load, each address as often as it is loaded."""

    def __init__(self) -> None:
        self._addresses: list[Any] = []

    def add(self, addresses: Any, width: int) -> None:
        self._addresses.append((addresses, width))

    def within(self, tensors: Sequence[torch.Tensor]) -> int:
        """The bytes in some tensors."""
        total = 0
        for tensor in tensors:
            begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            for addresses, width in self._addresses:
                total += width * int(((addresses >= begin) & (addresses < end)).sum())
        return total

    def distinct(self) -> int:
        """The bytes in all tensors, each once, as the memory of a card delivers them."""
        widths = {width for _, width in self._addresses}
        groups = [[each for each, own in self._addresses if own == width] for width in widths]
        return sum(
            width * len(np.unique(np.concatenate(group)))
            for width, group in zip(widths, groups, strict=True)
        )


@pytest.mark.thorough
def test_the_kernels_of_layers_compute_what_the_layers_themselves_do(golden: Path) -> None:
    network, shape, heads = network_of(golden, batch_invariant=True)
    found = []
    for compiled in (network.compiled_layers, None):
        network.compiled_layers = compiled
        backend = split_attention.SplitAttention(shape, CPU, torch.float32, heads=heads)
        backend.plan(spread([2], [2], shape, seed=1))
        found.append(network(TOKENS[:2], torch.arange(2), None, backend))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@dataclass(frozen=True)
class OneLayer:
    """A layer of some size, a stream, and a sequence with a long context."""

    weights: Any
    cache: tuple[torch.Tensor, torch.Tensor]
    step: Any
    stream: torch.Tensor  # [1, dim]
    rotation: torch.Tensor  # [1, head_dim / 2]

    @classmethod
    def random(cls, dim: int) -> "OneLayer":
        hidden, heads, kv_heads, head_dim, context = 2 * dim, 4, 2, dim // 4, 200
        pack = packing("none", torch.float16, CPU, batch_invariant=True)
        shapes = {
            "wqkv": ((heads + 2 * kv_heads) * head_dim, dim),
            "wo": (dim, heads * head_dim),
            "w13": (2 * hidden, dim),
            "w2": (dim, hidden),
        }
        matrices = {name: pack(0.02 * torch.randn(shape)).blocks for name, shape in shapes.items()}  # type: ignore[union-attr]
        norms = {name: torch.ones(dim).half() for name in ("attention_norm", "ffn_norm")}
        blocks = -(-context // 16)
        keys, values = torch.randn(2, blocks, 16, kv_heads, head_dim).half()
        step = attention.AttentionStep(
            slots=torch.tensor([context - 1], dtype=torch.int32),
            tiles=torch.tensor([[0, 1, context, 0]], dtype=torch.int32),
            pages=torch.arange(blocks, dtype=torch.int32),
            decodes=1,
            splits=-(-context // attention.SPLIT),
        )
        rotation = torch.polar(torch.ones(1, head_dim // 2), torch.randn(1, head_dim // 2))
        weights = layers.LayerWeights(**matrices, **norms)
        return cls(weights, (keys, values), step, torch.randn(1, dim).half(), rotation)

    def run(self, add: Callable[[torch.Tensor], object] | None = None) -> torch.Tensor:
        """The stream behind the layer; `add` sums over shards."""
        network = layers.InvariantLayers([self.weights], 1e-5, add)
        stream: torch.Tensor = network.run(
            self.stream.clone(),
            self.rotation,
            lambda _: self.cache,
            self.step.slots,
            lambda _, query: attention.attend(query, self.cache, self.step),
        )
        return stream


def test_a_layer_of_a_decode_step_launches_six_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    launch = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        with launches.one(self.fn.__name__):
            launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    layer = OneLayer.random(64)
    with torch.inference_mode(), launches:
        layer.run()
    # The first two are of the test, and of the step: the sums of squares of the embeddings.
    heads, rest = ["multiply_tile", "attend_tile", "join_splits"], ["multiply_tile"] * 3
    assert launches.names == ["clone", "_add", *heads, *rest]


def test_both_products_of_a_layer_are_summed_over_shards_before_they_are_added() -> None:
    layer = OneLayer.random(64)
    parts: list[torch.Size] = []
    summed = layer.run(lambda part: parts.append(part.shape))
    assert parts == [layer.stream.shape] * 2
    torch.testing.assert_close(summed, layer.run(), rtol=2**-8, atol=2**-8)
    changed = layer.run(lambda part: part.mul_(2))
    assert not torch.allclose(changed, summed, rtol=0, atol=0.01)


def test_a_decode_step_reads_each_weight_key_and_value_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads = Loads()
    load = interpreter.InterpreterBuilder.create_masked_load

    def recorded(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        found = load(self, ptrs, mask, *rest)
        loads.add(np.broadcast_to(ptrs.data, mask.data.shape)[mask.data], found.data.itemsize)
        return found

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", recorded)
    layer = OneLayer.random(256)
    layer.run()
    matrices = [getattr(layer.weights, name).codes for name in ("wqkv", "wo", "w13", "w2")]
    cache = [each.flatten(0, 1)[: layer.step.tiles[0, 2]] for each in layer.cache]
    needed = sum(each.nbytes for each in (*matrices, *cache))
    assert loads.within([*matrices, *cache]) == needed
    assert needed < loads.distinct() <= 1.02 * needed
