"""Conversions keep every number, and what they write is read back as the same network."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_service.model.config import LLAMA_3_SCALING, ModelConfig, RopeScaling
from model_service.model.operations import apply_rotary, rotary_frequencies
from model_service.model.weights.conversion.write_hugging_face import (
    halves_from_pairs,
    write_hugging_face,
)
from model_service.model.weights.conversion.write_meta import write_meta
from model_service.model.weights.files.hugging_face import open_hugging_face
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.files.meta.params import params_of, read_params
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.source import Shard, WeightSource
from model_service.offline.quantize import quantize_checkpoint
from serving.errors import StartError
from tests.model_service.hugging_face_models import VARIANTS, greedy, save_model

CPU = torch.device("cpu")


def weights(source: WeightSource) -> dict[str, torch.Tensor]:
    """All weights in the types in which they are stored."""
    return {
        name: weight.to(source.stored_dtype(name))
        for name, weight in source.read_shard(Shard(0, 1, torch.float32, CPU))
    }


def assert_equal(found: WeightSource, expected: WeightSource) -> None:
    own, theirs = weights(found), weights(expected)
    assert own.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert own[name].dtype == weight.dtype, name
        assert torch.equal(own[name], weight), name


@pytest.mark.parametrize("name", ["mha-mp1", "mha-mp1-bf16", "gqa-mp4"])
def test_meta_to_hugging_face_and_back(golden: Path, tmp_path: Path, name: str) -> None:
    original = open_checkpoint(golden / "checkpoints" / name)
    write_hugging_face(original, tmp_path / "hf")
    files = len(original.files)
    write_meta(open_weights(tmp_path / "hf"), tmp_path / "meta", files=files)
    converted = open_checkpoint(tmp_path / "meta")
    assert len(converted.files) == files
    assert converted.config.parameter_shapes() == original.config.parameter_shapes()
    assert_equal(converted, original)


def test_a_second_round_writes_the_same_bytes(golden: Path, tmp_path: Path) -> None:
    source: WeightSource = open_checkpoint(golden / "checkpoints" / "gqa-mp1")
    for number in "12":
        write_meta(source, tmp_path / f"meta{number}")
        write_hugging_face(open_weights(tmp_path / f"meta{number}"), tmp_path / f"hf{number}")
        source = open_weights(tmp_path / f"hf{number}")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf1" / file).read_bytes() == (tmp_path / "hf2" / file).read_bytes()
    # The content of each tensor's record; torch.save gives every archive another id.
    metas = [open_weights(tmp_path / f"meta{number}") for number in "12"]
    assert_equal(metas[0], metas[1])


@pytest.mark.parametrize("name", ["gqa", "llama3", "linear", "wide-heads", "theta"])
def test_hugging_face_to_meta_and_back(tmp_path: Path, name: str) -> None:
    save_model(tmp_path / "saved", VARIANTS[name])
    saved = open_hugging_face(tmp_path / "saved")
    write_meta(saved, tmp_path / "meta")
    meta = open_weights(tmp_path / "meta")
    assert meta.config == saved.config
    assert_equal(meta, saved)
    write_hugging_face(meta, tmp_path / "hf")
    assert open_weights(tmp_path / "hf").config == saved.config
    file = "model.safetensors"
    assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_a_tied_output_is_written_out_for_meta_and_left_out_for_hugging_face(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "saved", VARIANTS["tied"])
    saved = open_weights(tmp_path / "saved")
    write_meta(saved, tmp_path / "meta")
    assert_equal(open_weights(tmp_path / "meta"), saved)
    write_hugging_face(saved, tmp_path / "hf")
    assert "lm_head.weight" not in open_hugging_face(tmp_path / "hf").tensors
    assert open_weights(tmp_path / "hf").fingerprint() == saved.fingerprint()
    prompts = [[1, 2, 3, 100, 7]]
    assert greedy(loaded(tmp_path / "hf"), prompts, 8) == greedy(model, prompts, 8)


def loaded(folder: Path) -> torch.nn.Module:
    import transformers  # noqa: PLC0415  # takes seconds, and only some tests need it

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, torch.nn.Module)
    return model


@pytest.mark.parametrize("name", ["llama3", "linear", "theta", "wide-heads"])
def test_transformers_reads_the_settings_that_are_written(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "saved", VARIANTS[name])
    write_hugging_face(open_weights(tmp_path / "saved"), tmp_path / "hf")
    prompts = [[(5 * i) % 128 for i in range(40)]]
    assert greedy(loaded(tmp_path / "hf"), prompts, 8) == greedy(model, prompts, 8)


def test_large_networks_are_written_in_several_files(tmp_path: Path) -> None:
    save_model(tmp_path / "saved", VARIANTS["gqa"])
    saved = open_weights(tmp_path / "saved")
    write_hugging_face(saved, tmp_path / "hf", file_bytes=100_000)
    written = open_hugging_face(tmp_path / "hf")
    assert len(written.files) > 3
    assert all(path.stat().st_size < 110_000 for path in written.files)
    assert written.fingerprint() == saved.fingerprint()
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * saved.config.parameters


def test_hugging_face_folders_are_quantized_as_metas_are(tmp_path: Path) -> None:
    save_model(tmp_path / "saved", VARIANTS["tied"])
    write_meta(open_weights(tmp_path / "saved"), tmp_path / "meta")
    for name in ("saved", "meta"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-int4", "int4")
    own, theirs = (open_weights(tmp_path / f"{name}-int4") for name in ("saved", "meta"))
    assert own.fingerprint() == theirs.fingerprint()
    assert own.config.quantization == "int4"


Write = Callable[[WeightSource, Path], None]


@pytest.mark.parametrize("write", [write_meta, write_hugging_face])
def test_a_conversion_that_fails_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, write: Write
) -> None:
    path = checkpoint("mha-mp1") / "consolidated.00.pth"
    content = torch.load(path, weights_only=True)
    content["output.weight"][3, 3] = torch.nan
    torch.save(content, path)
    with pytest.raises(StartError, match=r"output.weight holds NaN"):
        write(open_weights(path.parent), tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("write", [write_meta, write_hugging_face])
def test_folders_in_use_are_left_alone(golden: Path, tmp_path: Path, write: Write) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(StartError, match="is not an empty folder: name a new one"):
        write(open_weights(golden / "checkpoints" / "mha-mp1"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


CONFIGS = st.builds(
    ModelConfig,
    dim=st.integers(1, 32).map(lambda n: 64 * n),
    n_layers=st.integers(1, 4),
    n_heads=st.sampled_from([4, 8]),
    n_kv_heads=st.sampled_from([None, 1, 4]),
    vocab_size=st.integers(1, 1000),
    multiple_of=st.sampled_from([32, 256]),
    ffn_dim_multiplier=st.none() | st.floats(0.5, 2),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
    quantization=st.sampled_from(["none", "int8"]),
    rope_theta=st.sampled_from([10000.0, 500000.0, 1e6]),
    rope_scaling=st.sampled_from([None, LLAMA_3_SCALING, RopeScaling("linear", 2.0)]),
    head_dim=st.sampled_from([0, 64]),
    hidden_dim=st.sampled_from([0, 100]),
    trained_context_length=st.sampled_from([2048, 4096, 8192, 131072]),
)


@given(config=CONFIGS)
def test_params_state_the_whole_configuration(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig
) -> None:
    path = tmp_path_factory.mktemp("params") / "params.json"
    path.write_text(json.dumps(params_of(config)))
    assert read_params(path) == config


def test_params_are_metas_own_where_these_suffice() -> None:
    shape: dict[str, Any] = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000}
    llama_2 = ModelConfig(**shape, trained_context_length=4096, hidden_dim=11008, head_dim=128)
    assert params_of(llama_2) == shape
    scaled = dataclasses.replace(
        llama_2, rope_scaling=LLAMA_3_SCALING, trained_context_length=131072, rope_theta=500000.0
    )
    assert params_of(scaled) == shape | {"rope_theta": 500000.0, "use_scaled_rope": True}


def rotate_halves(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """As transformers' apply_rotary_pos_emb: x [tokens, heads, head_dim]."""
    cos, sin = (part.repeat(1, 2).unsqueeze(1) for part in (rotary.real, rotary.imag))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def test_rotated_halves_score_as_rotated_pairs() -> None:
    torch.manual_seed(0)
    heads, head_dim, dim = 4, 8, 32
    query, key, x = torch.randn(32, dim), torch.randn(32, dim), torch.randn(6, dim)
    rotary = rotary_frequencies(head_dim, 6)

    def project(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).view(6, heads, head_dim)

    ours = [apply_rotary(project(weight), rotary) for weight in (query, key)]
    halves = [project(halves_from_pairs(weight, head_dim)) for weight in (query, key)]
    theirs = [rotate_halves(weight, rotary) for weight in halves]
    scores, their_scores = (torch.einsum("qhd,khd->hqk", *pair) for pair in (ours, theirs))
    torch.testing.assert_close(scores, their_scores)
