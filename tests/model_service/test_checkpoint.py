import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_service.model.checkpoint import open_checkpoint
from model_service.model.config import ModelConfig
from model_service.model.errors import CheckpointError

CPU = torch.device("cpu")


def full_weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder).read_shard(0, 1, torch.float32, CPU))


@pytest.mark.parametrize("files", ["gqa-mp1", "gqa-mp2", "gqa-mp4"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_files_load_onto_any_ranks(golden: Path, files: str, ranks: int) -> None:
    cut = golden / "checkpoints" / f"gqa-mp{ranks}"
    for rank in range(ranks):
        own = torch.load(cut / f"consolidated.{rank:02d}.pth", weights_only=True)
        checkpoint = open_checkpoint(golden / "checkpoints" / files)
        for name, weight in checkpoint.read_shard(rank, ranks, torch.float32, CPU):
            assert torch.equal(weight, own[name]), name


def test_weights_are_converted_and_counted(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "checkpoints" / "mha-mp1")
    weights = dict(checkpoint.read_shard(0, 2, torch.bfloat16, CPU))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert checkpoint.shard_parameters(2) == sum(weight.numel() for weight in weights.values())


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


def damage_dtype(folder: Path) -> None:
    _edit(folder, lambda weights: weights.update({"norm.weight": torch.ones(64).to(torch.int8)}))


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


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
        ({"rope_theta": 500000.0}, "Llama 2 does not know: rope_theta"),
        ({"dim": 0}, "dim is 0, not a positive number"),
        ({"n_heads": "many"}, "n_heads is 'many', not a positive number"),
        ({"n_heads": 3}, "do not divide into heads"),
        ({"n_layers": 3}, "lacks layers.2.attention.wk.weight"),
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


def test_missing_folder_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name the folder that holds params"):
        open_checkpoint(tmp_path / "nowhere")


def test_checksums_need_not_be_verified(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mha-mp1")
    damage_flip(folder)
    assert open_checkpoint(folder, verify=False).parameters == 178496
