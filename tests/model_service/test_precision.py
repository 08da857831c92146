import dataclasses
from typing import Any

import pytest
import torch

from model_service.loading.precision import (
    Determinism,
    Precision,
    choose_precision,
    cuda_dtype,
)
from model_service.model.config import ModelConfig
from model_service.model.cuda.requirements import require_kernels
from model_service.model.weight_sizes import weight_bytes
from serving.errors import StartError

H200, A100, T4 = (9, 0), (8, 0), (7, 5)
LLAMA_7B = ModelConfig(vocab_size=32000)


def on_cuda(quantization: Any) -> Precision:
    return Precision("cuda", torch.bfloat16, quantization, torch.bfloat16)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("none", "float16"), ("int8", "float16"), ("int4", "bfloat16"), ("fp8", "bfloat16")],
)
def test_auto_on_cuda_is_metas_type_where_the_kernels_take_it(
    quantization: Any, dtype: str
) -> None:
    assert cuda_dtype("auto", quantization, H200) == dtype


@pytest.mark.parametrize(
    ("dtype", "quantization", "capability", "message"),
    [
        ("float16", "int4", H200, "use --dtype bfloat16, or auto"),
        ("float32", "int8", H200, "in float16 or bfloat16, not float32"),
        ("auto", "fp8", A100, "8.9 or newer, this one has 8.0: use --quantize int8"),
        ("auto", "int8", T4, "8.0 or newer, this one has 7.5: use --quantize none"),
        ("bfloat16", "int4", T4, "8.0 or newer"),
    ],
)
def test_what_no_kernel_computes_is_refused(
    dtype: str, quantization: Any, capability: tuple[int, int], message: str
) -> None:
    with pytest.raises(StartError, match=message):
        cuda_dtype(dtype, quantization, capability)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("shards", [1, 2])
def test_llama_2_fits_the_tiles_of_every_format(quantization: Any, shards: int) -> None:
    on_cuda(quantization).check(LLAMA_7B, shards)


def test_matrices_that_are_no_whole_tiles_are_refused() -> None:
    config = ModelConfig(dim=96, n_heads=12, multiple_of=32, vocab_size=1000)
    with pytest.raises(StartError, match=r"do not divide vocab_size 1000 of a shard"):
        on_cuda("fp8").check(config, 1)


def test_int4_takes_little_more_than_half_a_byte_on_cuda() -> None:
    assert weight_bytes("int4", 2, "cuda") == 0.5625


def test_a_cache_in_fp8_is_another_arithmetic() -> None:
    own, narrow = (
        choose_precision(torch.device("cpu"), "float32", "int8", cache, small=True)
        for cache in ("auto", "fp8")
    )
    assert str(own) == "int8 (float32)"
    assert str(narrow) == "int8 (float32, fp8 cache)"
    assert narrow.kv_dtype.itemsize == 1


def test_batch_invariance_changes_nothing_on_the_cpu_whose_kernels_have_it() -> None:
    arguments: tuple[Any, ...] = (torch.device("cpu"), "float32", "none", "auto")
    plain, asked = (
        choose_precision(*arguments, small=False, batch_invariant=each) for each in (False, True)
    )
    if plain.uses_own_kernels:
        assert asked == plain
    assert plain.determinism is Determinism.BATCH_INVARIANT


def test_batch_invariance_is_refused_where_pytorchs_kernels_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model_service.loading.precision.kernels_for", lambda *_: None)
    with pytest.raises(StartError, match=r"--batch_invariant.*C\+\+ compiler, or leave"):
        choose_precision(
            torch.device("cpu"), "float32", "none", "auto", small=False, batch_invariant=True
        )


def test_batch_invariance_on_cuda_is_said_and_needs_whole_tiles() -> None:
    precision = dataclasses.replace(on_cuda("none"), batch_invariant=True)
    assert on_cuda("none").determinism is Determinism.SEEDED
    assert precision.determinism is Determinism.BATCH_INVARIANT
    assert str(precision) == "bfloat16, batch-invariant"
    precision.check(LLAMA_7B, 2)
    config = ModelConfig(dim=48, n_heads=4, multiple_of=32, vocab_size=1000)
    with pytest.raises(StartError, match=r"tiles of 32 inputs do not divide dim 48, heads 48"):
        precision.check(config, 1)


def test_batch_invariance_needs_a_gpu_that_its_kernels_know() -> None:
    with pytest.raises(StartError, match=r"8\.0 or newer, this one has 7\.5: leave the flag out"):
        require_kernels(T4)
