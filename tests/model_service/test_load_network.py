"""The memory that weights pass through on their way into the network."""

from collections.abc import Iterator

import pytest
import torch

from model_service.loading import distributed
from model_service.model.config import ModelConfig
from model_service.model.load_network import load_network
from model_service.model.network import Transformer
from model_service.model.weights.matrices import Pack, PackedWeight
from model_service.model.weights.packing import plain
from model_service.model.weights.partition import is_linear
from model_service.model.weights.source import Allocate

CPU = torch.device("cpu")
CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=32)


def load(pack: Pack) -> tuple[Transformer, dict[str, torch.Tensor], set[int]]:
    """A network, its weights by Meta's names, and the memory blocks that its matrices came by."""
    read: dict[str, torch.Tensor] = {}
    blocks: set[int] = set()

    def weights(allocate: Allocate) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in CONFIG.parameter_shapes().items():
            memory = allocate(name, shape, torch.float32, CPU)
            read[name] = memory.normal_().clone()
            if is_linear(name):
                blocks.add(memory.untyped_storage().data_ptr())
            yield name, memory

    distributed.initialize("cpu")
    network = load_network(CONFIG, 8, weights, pack=pack, dtype=torch.float32, device=CPU)
    return network, read, blocks


def assert_holds(network: Transformer, read: dict[str, torch.Tensor]) -> None:
    """Multiplies by each matrix: packed ones have no other use."""
    for layer in range(CONFIG.n_layers):
        for group, joined, parts in (
            ("attention", "wqkv", ("wq", "wk", "wv")),
            ("attention", "wo", ("wo",)),
            ("feed_forward", "w13", ("w1", "w3")),
            ("feed_forward", "w2", ("w2",)),
        ):
            prefix = f"layers.{layer}.{group}"
            expected = torch.cat([read[f"{prefix}.{part}.weight"] for part in parts])
            weight = network.get_submodule(f"{prefix}.{joined}").weight
            product = torch.nn.functional.linear(torch.eye(expected.shape[1]), weight)  # type: ignore[arg-type]
            assert torch.equal(product, expected.t()), prefix


def test_packed_matrices_pass_through_one_memory() -> None:
    def pack(weight: torch.Tensor) -> PackedWeight:
        own = weight.clone()
        return PackedWeight(lambda x: x @ own.t())

    network, read, blocks = load(pack)
    assert_holds(network, read)
    assert len(blocks) < 2 * CONFIG.n_layers  # it grew up to the largest matrix


def test_plain_matrices_keep_memory_of_their_own_size() -> None:
    network, read, blocks = load(plain)
    assert_holds(network, read)
    assert len(blocks) == 4 * CONFIG.n_layers + 1
    for name, matrix in network.named_parameters():
        assert matrix.untyped_storage().nbytes() == matrix.nbytes, name
    output = network.output.weight
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, read["output.weight"])
    assert output.untyped_storage().nbytes() == output.nbytes


@pytest.mark.parametrize("limit", [64 * 64, 64 * 96, 64 * 128])
def test_matrices_that_stay_plain_are_not_overwritten(limit: int) -> None:
    def pack_large(weight: torch.Tensor) -> torch.Tensor | PackedWeight:
        if weight.numel() <= limit:
            return weight
        own = weight.clone()
        return PackedWeight(lambda x: x @ own.t())

    network, read, _ = load(pack_large)
    assert_holds(network, read)
