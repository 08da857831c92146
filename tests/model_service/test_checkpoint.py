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

from model_service.model.errors import CheckpointError
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
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
