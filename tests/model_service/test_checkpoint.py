import contextlib
import dataclasses
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_service.model.config import ModelConfig, RopeScaling
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.files.meta.params import read_params
from model_service.model.weights.partition import shard_parameters
from model_service.model.weights.source import Shard
from model_service.offline.quantize import quantize_checkpoint
from serving.errors import StartError

CPU = torch.device("cpu")
WQ = "layers.0.attention.wq.weight"


def full_weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder).read_shard(Shard(0, 1, torch.float32, CPU)))


@pytest.mark.parametrize("files", ["gqa-mp1", "gqa-mp2", "gqa-mp4"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_files_load_onto_any_ranks(golden: Path, files: str, ranks: int) -> None:
    cut = golden / "checkpoints" / f"gqa-mp{ranks}"
    for rank in range(ranks):
        own = torch.load(cut / f"consolidated.{rank:02d}.pth", weights_only=True)
        checkpoint = open_checkpoint(golden / "checkpoints" / files)
        for name, weight in checkpoint.read_shard(Shard(rank, ranks, torch.float32, CPU)):
            assert torch.equal(weight, own[name]), name


def split_by_rows(folder: Path, numbers: range) -> None:
    """Splits the embedding as Llama 3 does."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    files = [torch.load(path, weights_only=True) for path in paths]
    rows = torch.cat([file["tok_embeddings.weight"] for file in files], dim=1).chunk(len(files))
    for number in numbers:
        torch.save(files[number] | {"tok_embeddings.weight": rows[number].clone()}, paths[number])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_files_may_split_the_vocabulary_as_llama_3_does(
    checkpoint: Callable[[str], Path], golden: Path, ranks: int
) -> None:
    folder = checkpoint("gqa-mp4")
    split_by_rows(folder, range(4))
    params = json.loads((folder / "params.json").read_text()) | {"vocab_size": 560}
    (folder / "params.json").write_text(json.dumps(params))
    original = open_checkpoint(golden / "checkpoints" / "gqa-mp4")
    for rank in range(ranks):
        found = dict(open_checkpoint(folder).read_shard(Shard(rank, ranks, torch.float32, CPU)))
        for name, weight in original.read_shard(Shard(rank, ranks, torch.float32, CPU)):
            assert torch.equal(found[name], weight), name


def test_all_files_must_split_the_vocabulary_alike(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gqa-mp4")
    split_by_rows(folder, range(1, 4))
    with pytest.raises(CheckpointError, match=r"01\.pth: splits .* otherwise than"):
        open_checkpoint(folder)


def test_weights_are_converted_and_counted(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "checkpoints" / "mha-mp1")
    weights = dict(checkpoint.read_shard(Shard(0, 2, torch.bfloat16, CPU)))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert shard_parameters(checkpoint.config, 2) == sum(
        weight.numel() for weight in weights.values()
    )


def test_rope_frequencies_may_be_present_or_not(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mha-mp1")
    path = folder / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    weights.pop("rope.freqs")
    before = full_weights(folder)
    torch.save(weights, path)
    assert full_weights(folder).keys() == before.keys()


def test_fingerprint_tells_weights_apart_and_survives_a_second_save(
    checkpoint: Callable[[str], Path],
) -> None:
    folder = checkpoint("mha-mp1")
    path = folder / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    torch.save(weights, path)
    first = open_checkpoint(folder).fingerprint()
    torch.save(weights, path)
    assert open_checkpoint(folder).fingerprint() == first
    weights["norm.weight"] = weights["norm.weight"] + 1
    torch.save(weights, path)
    assert open_checkpoint(folder).fingerprint() != first


@pytest.mark.parametrize(
    ("params", "hidden_dim"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),  # 7B
        ({"dim": 5120, "multiple_of": 256}, 13824),  # 13B
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),  # 70B
    ],
)
def test_hidden_dimension_is_that_of_metas_models(
    params: dict[str, float], hidden_dim: int
) -> None:
    assert ModelConfig(**params).hidden_dim == hidden_dim  # type: ignore[arg-type]


def test_params_of_llama_3_are_understood(tmp_path: Path) -> None:
    llama_3 = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
    }
    path = tmp_path / "params.json"
    path.write_text(json.dumps(llama_3))
    config = read_params(path)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, None)
    assert (config.hidden_dim, config.trained_context_length) == (14336, 8192)
    assert config.parameters == 8_030_261_248
    path.write_text(json.dumps(llama_3 | {"use_scaled_rope": True}))
    config = read_params(path)
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.trained_context_length == 131072


def test_params_may_state_sizes_that_metas_code_derives(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    scaling = {"kind": "linear", "factor": 4}
    stated = {"head_dim": 48, "hidden_dim": 1000, "trained_context_length": 16384}
    path.write_text(json.dumps({"dim": 100, "n_heads": 3, "rope_scaling": scaling} | stated))
    config = read_params(path)
    assert config.rope_scaling == RopeScaling("linear", 4)
    assert {name: getattr(config, name) for name in stated} == stated
    assert config.parameter_shapes()["layers.0.attention.wo.weight"] == (100, 144)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def damage_truncate(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_flip(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def damage_code(folder: Path) -> None:
    torch.save({"norm.weight": RunsCode()}, folder / "consolidated.00.pth")


def damage_text(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_text("<html>not found</html>")


def damage_other_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
        archive.writestr("readme", "hello")


def damage_remove_shard(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()


def damage_remove_first_shard(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def damage_drop_tensor(folder: Path) -> None:
    _edit(folder, lambda weights: weights.pop("layers.0.attention.wq.weight"))


def damage_add_tensor(folder: Path) -> None:
    _edit(folder, lambda weights: weights.update({"adapter.weight": torch.ones(1)}))


def damage_meta(folder: Path) -> None:
    _edit(folder, lambda weights: weights.update({WQ: weights[WQ].to("meta")}))


def damage_sparse(folder: Path) -> None:
    _edit(folder, lambda weights: weights.update({WQ: weights[WQ].to_sparse()}))


def damage_nested(folder: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    _edit(folder, lambda weights: weights.update({WQ: nested}))


def damage_complex(folder: Path) -> None:
    _edit(folder, lambda weights: weights.update({WQ: weights[WQ].to(torch.complex64)}))


def damage_embedding(folder: Path) -> None:
    _edit(folder, lambda weights: weights.update({"tok_embeddings.weight": torch.tensor(1.0)}))


def damage_wrap(folder: Path) -> None:
    _replace(folder, lambda weights: {"epoch": 3, "model": weights})


def damage_prefix(folder: Path) -> None:
    _replace(folder, lambda weights: {f"module.{name}": each for name, each in weights.items()})


def damage_copy(folder: Path) -> None:
    _edit(folder, lambda weights: weights["layers.1.ffn_norm.weight"].add_(0.02))


def damage_infinity(folder: Path) -> None:
    _edit(folder, lambda weights: weights["norm.weight"][5:].fill_(math.inf))


def damage_dtype(folder: Path) -> None:
    _edit(folder, lambda weights: weights.update({"norm.weight": torch.ones(64).to(torch.int8)}))


def _replace(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "consolidated.00.pth"
    torch.save(change(torch.load(path, weights_only=True)), path)


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (damage_truncate, "consolidated.00.pth", "cut short"),
        (damage_flip, "consolidated.00.pth", "fails its checksum"),
        (damage_code, "consolidated.00.pth", "could run code"),
        (damage_text, "consolidated.00.pth", "cut short, or not in the format"),
        (damage_other_zip, "consolidated.00.pth", "cannot be read as a checkpoint"),
        (damage_remove_shard, "consolidated.00.pth", "is 560 × 32; params.json and 1 file make it"),
        (damage_remove_first_shard, "consolidated.00.pth", "consolidated.01.pth is there"),
        (damage_drop_tensor, "consolidated.00.pth", "lacks layers.0.attention.wq.weight"),
        (damage_add_tensor, "consolidated.00.pth", "also holds adapter.weight"),
        (damage_dtype, "consolidated.00.pth", "norm.weight is int8"),
        (damage_meta, "consolidated.00.pth", f"{WQ} is on the device meta"),
        (damage_sparse, "consolidated.00.pth", f"{WQ} is stored as sparse_coo"),
        (damage_nested, "consolidated.00.pth", f"{WQ} is stored as nested"),
        (damage_complex, "consolidated.00.pth", f"{WQ} is complex64"),
        (damage_embedding, "consolidated.00.pth", "tok_embeddings.weight is a single number"),
        (damage_wrap, "consolidated.00.pth", "weights_only=True)['model'], path)"),
        (damage_prefix, "consolidated.00.pth", "its names begin with 'module.'"),
        (damage_copy, "consolidated.01.pth", "layers.1.ffn_norm.weight is not the one that"),
        (damage_infinity, "consolidated.00.pth", "norm.weight holds NaN, or numbers"),
    ],
)
def test_damaged_checkpoint_names_file_and_fix(
    checkpoint: Callable[[str], Path], damage: Callable[[Path], None], file: str, problem: str
) -> None:
    folder = checkpoint("mha-mp2")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert str(error.value).startswith(f"{folder / file}: ")
    assert problem in str(error.value)
    assert ". To fix: " in str(error.value)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ({"n_experts": 8}, "Llama does not know: n_experts"),
        ({"tied_embeddings": True}, "Llama does not know: tied_embeddings"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5, not a number from 1 to 1e+12"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, not true or false"),
        ({"rope_scaling": 8}, "rope_scaling is 8, not an object"),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling lacks kind"),
        ({"rope_scaling": {"kind": "yarn"}}, "rope_scaling lacks factor"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 8}},
            "rope_scaling has kind 'yarn', not linear or llama3",
        ),
        (
            {"rope_scaling": {"kind": "llama3", "factor": 8, "low_freq_factor": 4}},
            "has low_freq_factor 4, not a number below its high_freq_factor 4",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has the unknown field 'type'"),
        ({"head_dim": 15}, "do not divide into heads of even size"),
        ({"dim": 0}, "dim is 0, not an integer from 1 to 1048576"),
        ({"dim": True}, "dim is True, not an integer"),
        ({"n_heads": "many"}, "n_heads is 'many', not an integer"),
        ({"n_layers": 2.0}, "n_layers is 2.0, not an integer"),
        ({"n_layers": 10_000_000}, "n_layers is 10000000, not an integer from 1 to 1048576"),
        ({"n_layers": 1_000_000}, "holds 2 layers, params.json states n_layers 1000000"),
        ({"norm_eps": math.inf}, "norm_eps is inf, not a number above 0 and at most 0.1"),
        ({"norm_eps": math.nan}, "norm_eps is nan, not a number"),
        ({"ffn_dim_multiplier": -1.3}, "ffn_dim_multiplier is -1.3, not a number above 0"),
        ({"quantization": ["int8"]}, "quantization is ['int8'], not none or int8"),
        ("[" * 100_000, "is not JSON"),
        ({"n_heads": 3}, "do not divide into heads"),
        ({"n_layers": 3}, "holds 2 layers, params.json states n_layers 3"),
        ({"vocab_size": 561}, "tok_embeddings.weight is 560 × 64"),
    ],
)
def test_wrong_params_name_file_and_setting(
    checkpoint: Callable[[str], Path], params: str | dict[str, object], problem: str
) -> None:
    folder = checkpoint("mha-mp1")
    path = folder / "params.json"
    if isinstance(params, dict):
        params = json.dumps(json.loads(path.read_text()) | params)
    path.write_text(params)
    with pytest.raises(CheckpointError, match="To fix: ") as error:
        open_checkpoint(folder)
    assert problem in str(error.value)


@given(
    name=st.sampled_from([field.name for field in dataclasses.fields(ModelConfig)]),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -1, 2**20, 1e-300, 64, "int8", [], {}])
    | st.text(max_size=3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_setting_is_served_as_it_is_or_refused(
    golden: Path, tmp_path: Path, name: str, value: object
) -> None:
    source = golden / "checkpoints" / "mha-mp1"
    params = json.loads((source / "params.json").read_text()) | {name: value}
    (tmp_path / "params.json").write_text(json.dumps(params))
    if not (tmp_path / "consolidated.00.pth").exists():
        (tmp_path / "consolidated.00.pth").symlink_to(source / "consolidated.00.pth")
    try:
        config = read_params(tmp_path / "params.json")
    except CheckpointError:
        return
    assert 0 < config.norm_eps <= 0.1
    with contextlib.suppress(CheckpointError):
        served = open_checkpoint(tmp_path, verify=False).config.parameter_shapes()
        assert served == open_checkpoint(source, verify=False).config.parameter_shapes()


def test_weights_that_are_not_finite_are_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mha-mp1")
    _edit(folder, lambda weights: weights[WQ][3, 5].fill_(1e30))
    assert full_weights(folder)[WQ].max() == 1e30
    with pytest.raises(CheckpointError, match=f"{WQ} holds NaN, or .* infinite in float16"):
        list(open_checkpoint(folder).read_shard(Shard(0, 2, torch.float16, CPU)))
    _edit(folder, lambda weights: weights[WQ][3, 5].fill_(math.nan))
    with pytest.raises(CheckpointError, match=f"{WQ} holds NaN"):
        full_weights(folder)
    with pytest.raises(StartError, match=f"{WQ} holds NaN"):
        quantize_checkpoint(folder, folder / "int8", "int8")


def test_copies_may_drift_by_some_roundings(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint("mha-mp2")
    _edit(folder, lambda weights: weights["norm.weight"][0].add_(0.001))
    assert full_weights(folder)["norm.weight"][0] > 1
    assert "norms differ by up to 0.001 from those of consolidated.00.pth" in caplog.text


def test_files_must_divide_what_they_share(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mha-mp1")
    for number in (1, 2):
        shutil.copy(folder / "consolidated.00.pth", folder / f"consolidated.0{number}.pth")
    with pytest.raises(CheckpointError, match="3 files do not divide the 64 of tok_embeddings"):
        open_checkpoint(folder)


def test_missing_folder_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name the folder that holds params"):
        open_checkpoint(tmp_path / "nowhere")


def test_checksums_need_not_be_verified(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mha-mp1")
    damage_flip(folder)
    assert open_checkpoint(folder, verify=False).config.parameters == 178496
