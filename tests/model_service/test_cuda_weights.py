"""Weights where only a CUDA device can show that they are right; elsewhere all is skipped."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.weights import cuda as weights_cuda
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.packing import packing
from model_service.model.weights.quantization import Int4Weight, fp8_rows
from model_service.model.weights.source import Shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = torch.device("cuda", 0)
# Relative errors of a product; fp8 with activations in e4m3.
ROUNDING = {"int8": 0.01, "int4": 0.12, "fp8": 0.05}
DTYPES = {
    "int8": [torch.float16, torch.bfloat16],
    "int4": [torch.bfloat16],
    "fp8": [torch.bfloat16],
}
CASES = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]
# Outputs and inputs: tiles of both widths, a row that 256 does not divide, 7B's longest rows.
SHAPES = [(4096, 512), (12288, 256), (272, 1376), (128, 11008)]


@pytest.fixture
def kernels() -> Any:
    """Only there where Triton is."""
    return importlib.import_module("model_service.model.cuda.weight_kernels")


def random_matrix(*size: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*size, generator=generator, device=DEVICE)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_plain_weight(
    name: Any, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = random_matrix(*shape) / shape[1] ** 0.5
    packed = packing(name, dtype, DEVICE)(weight)
    for rows in (0, 1, 2, 16, 17, 33, 64, 65, 256, 257):
        x = random_matrix(rows, shape[1], seed=2).to(dtype)
        product = F.linear(x, packed)  # type: ignore[arg-type]
        exact = F.linear(x.float(), weight)
        assert product.dtype == dtype
        assert (product.float() - exact).norm() <= ROUNDING[name] * exact.norm(), rows


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_row_is_the_same_among_others(name: Any, dtype: torch.dtype) -> None:
    packed = packing(name, dtype, DEVICE)(random_matrix(4096, 1024) / 32)
    x = random_matrix(300, 1024, seed=2).to(dtype)
    together = F.linear(x, packed).float()  # type: ignore[arg-type]
    for rows in (1, 16, 64, 256):
        alone = F.linear(x[:rows], packed).float()  # type: ignore[arg-type]
        # The activations of a few rows are not quantized.
        bound = 0.04 if name == "fp8" else 0.01
        assert (alone - together[:rows]).norm() <= bound * alone.norm(), rows


def test_four_bit_codes_lie_where_the_layout_says(kernels: Any) -> None:
    quantized = Int4Weight.quantize(random_matrix(64, 1376))
    swapped = quantized.codes << 4 | quantized.codes >> 4
    tiles = torch._convert_weight_to_int4pack(swapped, weights_cuda.tinygemm_inner_tiles(1376))
    assert torch.equal(weights_cuda.tinygemm_codes(tiles), quantized.unpacked_codes())
    scales = weights_cuda.tinygemm_scales(quantized)
    plain = weights_cuda.dequantize_tinygemm(tiles, scales)
    torch.testing.assert_close(kernels.unpack_int4(tiles, scales), plain)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8"
)
def test_rows_become_the_codes_of_the_definition(kernels: Any) -> None:
    x = random_matrix(6, 5000).bfloat16()
    x[1], x[2, 7], x[3, 100] = 0.0, torch.nan, torch.inf
    codes, scales = kernels.fp8_rows(x)
    expected, expected_scales = fp8_rows(x)
    torch.testing.assert_close(scales, expected_scales, equal_nan=True)
    values, exact = (each.float()[[0, 1, 4, 5]] for each in (codes, expected))
    # A quotient may be rounded to the other side of a tie.
    assert (values != exact).float().mean() < 0.001
    torch.testing.assert_close(values, exact, rtol=0.13, atol=2**-9)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_graph_holds_the_product(name: Any, dtype: torch.dtype) -> None:
    packed = packing(name, dtype, DEVICE)(random_matrix(1024, 1024) / 32)
    for rows in (1, 48, 300):
        x = random_matrix(rows, 1024).to(dtype)
        F.linear(x, packed)  # type: ignore[arg-type]  # kernels are loaded outside of the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = F.linear(x, packed)  # type: ignore[arg-type]
        x.copy_(random_matrix(rows, 1024, seed=3))
        graph.replay()
        torch.testing.assert_close(product, F.linear(x, packed))  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpoint", ["gqa-mp1", "mha-mp2"])
def test_what_arrives_is_what_the_files_hold(golden: Path, checkpoint: str) -> None:
    opened = open_checkpoint(golden / "checkpoints" / checkpoint)
    for rank in range(2):
        there = opened.read_shard(Shard(rank, 2, torch.float16, DEVICE))
        here = opened.read_shard(Shard(rank, 2, torch.float16, torch.device("cpu")))
        for (name, weight), (_, expected) in zip(there, here, strict=True):
            assert torch.equal(weight.cpu(), expected), name


def test_pieces_are_not_overwritten_before_they_are_fetched() -> None:
    source = torch.arange(2**22).view(2048, 2048).float()
    target = torch.empty(2048, 2048, dtype=torch.bfloat16, device=DEVICE)
    WeightUpload(DEVICE, 100_000).copy(source, target)
    assert torch.equal(target.cpu(), source.bfloat16())


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_cache_gets_what_a_measured_step_leaves(golden: Path, quantize: Any) -> None:
    folder = golden / "checkpoints" / "gqa-mp1"
    options = ReplicaOptions(folder, max_seq_len=64, max_batch_size=2, device="cuda")
    options = dataclasses.replace(options, quantize=quantize)
    replica = load_replica(options)
    assert replica.limits.lookahead
    assert replica.limits.blocks * replica.limits.block_size >= 64
    assert replica.info.quantization == quantize
