"""`chasqui model convert`: the same weights in the other format, also after an interruption."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from model_service.model.errors import CheckpointError
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.source import Shard
from model_service.offline.conversion.convert import ConversionOptions, convert
from model_service.offline.quantize import quantize_checkpoint
from model_service.offline.verification import verify
from serving.errors import StartError
from tests.chasqui.cli.model.conftest import flip
from tests.command import GOLDEN, Run

CPU = torch.device("cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(folder).read_shard(Shard(0, 1, torch.float32, CPU)))


@pytest.mark.parametrize("checkpoint", ["gqa-mp2", "mha-mp1-bf16"])
def test_there_and_back_gives_the_same_bytes(checkpoint: str, tmp_path: Path) -> None:
    source = GOLDEN / "checkpoints" / checkpoint
    files = len([*source.glob("*.pth")])
    convert(source, tmp_path / "meta", ConversionOptions("meta"))
    convert(tmp_path / "meta", tmp_path / "hf", ConversionOptions("hf"))
    convert(tmp_path / "hf", tmp_path / "back", ConversionOptions("meta", files))

    first, last = contents(tmp_path / "meta"), contents(tmp_path / "back")
    assert all(first[name] == last[name] for name in first if name.endswith(".pth"))
    shapes = [open_weights(each).config.parameter_shapes() for each in (source, tmp_path / "back")]
    assert shapes[0] == shapes[1]
    original = [torch.load(file) for file in sorted(source.glob("*.pth"))]
    back = [torch.load(file) for file in sorted((tmp_path / "back").glob("*.pth"))]
    for one, other in zip(original, back, strict=True):
        assert one.keys() - other.keys() <= {"rope.freqs"}
        assert all(torch.equal(one[name], other[name]) for name in other)
        assert all(one[name].dtype == other[name].dtype for name in other)


def test_the_command_writes_a_whole_model_with_its_tokenizer(
    meta_model: Path, tmp_path: Path, run: Run
) -> None:
    target = tmp_path / "hf"
    done = run(
        "model", "convert", str(meta_model), str(target), "--to", "hf", "--file_bytes", "400000"
    )
    assert done.returncode == 0, done.stderr
    assert len([*target.glob("model-0000?-of-00003.safetensors")]) == 3
    assert (target / "tokenizer.model").read_bytes() == (
        meta_model / "tokenizer.model"
    ).read_bytes()
    checks = [*verify(target, lambda _read: None)]
    assert all("SHA-256" in check.text and check.whole for check in checks)
    found = weights(target)
    assert all(torch.equal(found[name], value) for name, value in weights(meta_model).items())


@pytest.mark.parametrize("form", [pytest.param("meta", marks=pytest.mark.thorough), "hf"])
def test_an_interrupted_conversion_goes_on(
    form: str, meta_model: Path, tmp_path: Path, run: Run
) -> None:
    source = Path(shutil.copytree(meta_model, tmp_path / "source"))
    division = ["--files", "4"] if form == "meta" else ["--file_bytes", "300000"]
    arguments = ["model", "convert", str(source), "--to", form, *division]
    assert run(*arguments, str(tmp_path / "at once")).returncode == 0
    target = tmp_path / "target"
    with broken_last_weight(source / "consolidated.01.pth"):
        failed = run(*arguments, str(target))
        assert failed.returncode == 1
        assert "output.weight holds NaN" in failed.stderr
    finished = {file: file.stat().st_mtime_ns for file in target.glob("*0[0-9]*.[ps]*")}
    assert len(finished) == 3

    done = run(*arguments, str(target))

    assert done.returncode == 0, done.stderr
    assert contents(target) == contents(tmp_path / "at once")
    assert all(file.stat().st_mtime_ns == age for file, age in finished.items())


def test_a_finished_file_that_was_damaged_is_written_again(
    meta_model: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(meta_model, tmp_path / "source"))
    options = ConversionOptions("meta", 4)
    convert(source, tmp_path / "at once", options)
    target = tmp_path / "target"
    with broken_last_weight(source / "consolidated.01.pth"), pytest.raises(CheckpointError):
        convert(source, target, options)
    flip(target / "consolidated.00.pth", 5000)
    convert(source, target, options)
    assert contents(target) == contents(tmp_path / "at once")


@contextmanager
def broken_last_weight(path: Path) -> Iterator[None]:
    """A NaN in the last row of the output matrix, which conversions come to last."""
    content = path.read_bytes()
    tensors = torch.load(path)
    tensors["output.weight"][-1] = torch.nan
    torch.save(tensors, path)
    age = path.stat().st_mtime_ns
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(age, age))  # it counts as the same source


def test_another_conversion_is_not_mixed_in(meta_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(meta_model, tmp_path / "source"))
    target = tmp_path / "target"
    with broken_last_weight(source / "consolidated.01.pth"), pytest.raises(CheckpointError):
        convert(source, target, ConversionOptions("meta", 4))
    with pytest.raises(StartError, match="unfinished conversion of another model"):
        convert(source, target, ConversionOptions("meta", 4, dtype="float16"))
    with pytest.raises(StartError, match="is not an empty folder"):
        convert(source, source, ConversionOptions("hf"))


def test_numbers_of_files_that_do_not_divide_the_model_are_refused(
    meta_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(StartError, match=r"--files with one of 1, 2, 4"):
        convert(meta_model, tmp_path / "target", ConversionOptions("meta", 3))
    assert not (tmp_path / "target").exists()


def test_weights_are_rounded_to_another_type(meta_model: Path, tmp_path: Path) -> None:
    convert(meta_model, tmp_path / "hf", ConversionOptions("hf", dtype="bfloat16"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = weights(tmp_path / "hf")
    for name, value in weights(meta_model).items():
        assert torch.equal(found[name], value.bfloat16().float())


def test_a_quantized_model_is_refused(meta_model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(meta_model, tmp_path / "int8", "int8")
    with pytest.raises(CheckpointError, match="is quantized to int8"):
        convert(tmp_path / "int8", tmp_path / "hf", ConversionOptions("hf"))
