"""Hugging Face folders give the answers that transformers gives with them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_service.loading import distributed
from model_service.loading.precision import Precision
from model_service.model.config import RopeScaling
from model_service.model.load_network import load_network
from model_service.model.weights.files.hugging_face import open_hugging_face
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.packing import plain
from model_service.model.weights.partition import shard_parameters
from model_service.model.weights.source import Shard
from tests.model_service.hugging_face_models import (
    LENGTH,
    LLAMA_3,
    PROMPTS,
    VARIANTS,
    Variant,
    check_greedy_answers,
    greedy,
    save_model,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folders of all variants, and transformers' answers."""
    folder = tmp_path_factory.mktemp("models")
    return {
        str(folder / name): greedy(save_model(folder / name, variant), PROMPTS, LENGTH)
        for name, variant in VARIANTS.items()
    }


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_greedy_answers_are_those_of_transformers(models: dict[str, Any], shards: int) -> None:
    check_greedy_answers(models, shards)


def folder_of(models: dict[str, Any], name: str) -> Path:
    return next(Path(folder) for folder in models if Path(folder).name == name)


def test_the_number_of_files_does_not_change_the_fingerprint(models: dict[str, Any]) -> None:
    several, one = (open_hugging_face(folder_of(models, name)) for name in ("files", "gqa"))
    assert len(several.files) > 3
    assert several.fingerprint() == one.fingerprint()


def test_one_changed_number_changes_the_fingerprint(models: dict[str, Any]) -> None:
    checkpoint = open_hugging_face(folder_of(models, "gqa"))
    before = checkpoint.fingerprint()
    weight = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    weight[-1, -1] += 1e-3  # of the mapped copy
    assert checkpoint.fingerprint() != before
    assert open_hugging_face(checkpoint.folder).fingerprint() == before


def test_a_tied_matrix_is_one_parameter_and_takes_memory_as_two(models: dict[str, Any]) -> None:
    tied, plain = (open_weights(folder_of(models, name)) for name in ("tied", "gqa"))
    assert plain.config.parameters - tied.config.parameters == 128 * 128
    assert shard_parameters(plain.config, 2) == shard_parameters(tied.config, 2)
    weights = dict(tied.read_shard(Shard(0, 1, torch.float32, CPU)))
    assert torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])


def test_a_tied_matrix_that_kernels_read_as_it_is_is_held_once(models: dict[str, Any]) -> None:
    tied, plain_source = (open_weights(folder_of(models, name)) for name in ("tied", "gqa"))
    for shards, saved in ((1, 128 * 128), (2, 0)):
        sizes = [
            Precision("cuda", torch.float16, "none", torch.float16).shard_bytes(source, shards)
            for source in (plain_source, tied)
        ]
        assert sizes[0] - sizes[1] == 2 * saved
    distributed.initialize("cpu")
    for source, shared in ((tied, True), (plain_source, False)):
        read = partial(source.read_shard, Shard(0, 1, torch.float32, CPU))
        network = load_network(source.config, 64, read, pack=plain, dtype=torch.float32, device=CPU)
        own = [network.get_submodule(name).weight for name in ("output", "tok_embeddings")]
        assert (own[0] is own[1]) is shared


def test_old_places_of_rotary_settings_mean_the_same(
    models: dict[str, Any], edited: Callable[..., Path]
) -> None:
    scaling = {"type": "llama3"} | {k: v for k, v in LLAMA_3.items() if k.startswith(("f", "l"))}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": scaling}
    config = open_weights(edited("gqa", old)).config
    assert config.rope_theta == 1e6
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


@pytest.fixture
def edited(models: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder whose config.json has other settings."""

    def edit(name: str, changes: dict[str, Any]) -> Path:
        for file in folder_of(models, name).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        settings = json.loads((tmp_path / "config.json").read_text()) | changes
        kept = {key: value for key, value in settings.items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        return tmp_path

    return edit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_into_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_model(tmp_path, Variant(), dtype)
    stored = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    for wanted in (torch.float32, torch.bfloat16):
        weights = dict(open_weights(tmp_path).read_shard(Shard(1, 2, wanted, CPU)))
        assert torch.equal(weights["layers.0.feed_forward.w3.weight"], stored[96:].to(wanted))


def test_an_older_file_may_hold_rotary_frequencies_and_a_tied_output(tmp_path: Path) -> None:
    save_model(tmp_path, VARIANTS["tied"])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    weights = dict(open_weights(tmp_path).read_shard(Shard(0, 1, torch.float32, CPU)))
    assert torch.equal(weights["output.weight"], tensors["model.embed_tokens.weight"])
