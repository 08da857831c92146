"""The files of a model made to do harm: every command refuses them with one line and status 1."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from llama.gguf_header import TensorEntry
from model_service.model.config import ModelConfig
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.gguf.scaling import divisors_scaling
from model_service.model.weights.files.weight_files import weight_files
from model_service.model.weights.open_weights import open_weights
from model_service.offline import __main__ as offline
from model_service.offline.conversion.convert import ConversionOptions, convert
from model_service.offline.stored_model import read_stored_model
from tests.chasqui.cli.model.conftest import change_json

INDEX = "model.safetensors.index.json"
Told = Callable[..., str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a command that must end with status 1, and returns what it says."""

    def told(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            offline.main([str(each) for each in arguments])
        printed = capsys.readouterr()
        assert ended.value.code == 1, printed
        return printed.out + printed.err

    return told


@pytest.fixture
def hf(hf_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf_model, tmp_path / "hf"))


def commands(folder: Path) -> list[tuple[object, ...]]:
    target = folder.with_name("converted")
    return [("inspect", folder), ("verify", folder), ("convert", folder, target, "--to", "meta")]


NAMES = ["", ".", "..", "../hf/x.safetensors", "/etc/passwd", "config.json", "model.bin", 5]
NAMES += ["x\0.safetensors", "\ud800.safetensors", f"{'x' * 5000}.safetensors", ["a"], None]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:24])
def test_index_names_files_of_its_folder_alone(hf: Path, told: Told, name: object) -> None:
    weight_map = json.loads((hf / INDEX).read_text())["weight_map"]
    change_json(hf / INDEX, weight_map={"model.norm.weight": name} | weight_map | {"a": name})
    for command in commands(hf):
        assert "which is not the name of a .safetensors file" in told(*command)
    with pytest.raises(CheckpointError, match="is not the name of a "):
        open_weights(hf)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {}}', "[" * 100_000]
)
def test_damaged_index_is_named(hf: Path, told: Told, content: str) -> None:
    (hf / INDEX).write_text(content)
    for command in commands(hf):
        assert f"{hf / INDEX}: " in told(*command)


def test_tensor_whose_name_is_no_text_can_be_told(hf: Path, told: Told) -> None:
    weight_map = json.loads((hf / INDEX).read_text())["weight_map"]
    file = next(iter(weight_map.values()))
    change_json(hf / INDEX, weight_map=weight_map | {"\ud800": file})
    assert "says that \\ud800 is in" in told("verify", hf)


@pytest.mark.parametrize("destination", ["nowhere", "config.json"])
def test_verify_names_a_link_that_leads_nowhere(hf: Path, told: Told, destination: str) -> None:
    (hf / "config.json").unlink()
    (hf / "config.json").symlink_to(destination)
    assert f"wrong  {hf / 'config.json'}: cannot be read: " in told("verify", hf)


@pytest.mark.parametrize("listed", ["/dev/zero", "../../../../../../../dev/zero", "x" * 5000, "."])
def test_verify_reads_no_device_that_a_list_names(hf: Path, told: Told, listed: str) -> None:
    (hf / "SHA256SUMS").write_text(f"{'0' * 64}  {listed}\n")
    assert "not found, and SHA256SUMS lists it" in told("verify", hf)


@pytest.mark.parametrize("path", ["missing", "x" * 5000, "/dev/null"])
def test_path_without_a_model_is_named_by_every_command(
    tmp_path: Path, told: Told, path: str
) -> None:
    for command in commands(tmp_path / path):
        assert "To fix: name" in (said := told(*command)) or "File name too long" in said


def test_layers_are_counted_before_a_list_of_all_parameters_is_made(hf: Path) -> None:
    change_json(hf / "config.json", num_hidden_layers=2**20)
    with pytest.raises(CheckpointError, match="layers, and its configuration states 1048576"):
        read_stored_model(hf)


MARKS = ("consolidated.00.pth", "params.json", "config.json", "model.safetensors", "a.gguf")


@pytest.mark.parametrize(
    "names", [each for count in range(1, 6) for each in itertools.combinations(MARKS, count)]
)
def test_inspection_and_loading_choose_the_same_of_several_formats(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    try:
        _, files = weight_files(tmp_path)
    except CheckpointError:
        files = []
    with pytest.raises(CheckpointError) as error:  # the files are empty
        open_weights(tmp_path)
    suffixes = {".pth": {".pth", ".json"}, ".safetensors": {".safetensors", ".json"}}
    for file in files:
        assert error.value.path.suffix in suffixes.get(file.suffix, {file.suffix})
        if ".gguf" in file.suffix:
            assert error.value.path == file


def test_conversion_that_was_stopped_at_its_first_file_goes_on(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "meta"
    target.mkdir()
    (target / ".conversion.json.new").write_text('{"opt')
    convert(hf, target, ConversionOptions("meta"))
    assert not any(name.name.startswith(".") for name in target.iterdir())


def test_factor_out_of_range_in_a_gguf_file_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(dim=32, n_heads=4)
    divisors = np.full(config.head_dim // 2, 5000, np.float32)
    for wrong in (divisors, np.zeros_like(divisors), divisors * np.float32(np.nan)):
        entry = TensorEntry(wrong.shape, gguf.GGMLQuantizationType.F32.value, 0)
        with pytest.raises(CheckpointError, match="has the factor"):
            divisors_scaling(tmp_path / "a.gguf", entry, wrong.view(np.uint8), config)


@pytest.mark.parametrize("size", [2, 4])
def test_gguf_file_that_ends_in_its_divisors_is_cut_short(
    tmp_path: Path, told: Told, size: int
) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 1),
        (writer.add_head_count, 4),
        (writer.add_feed_forward_length, 64),
        (writer.add_context_length, 64),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.add_tensor("rope_freqs.weight", np.full(4, 8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    begin = content.rindex(np.full(4, 8, np.float32).tobytes())
    path.write_bytes(content[: begin + size])
    assert "is cut short" in told("inspect", path)
