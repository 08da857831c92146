"""`chasqui model verify`: whole models, and files with one wrong bit."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from model_service.offline.verification import FileCheck, verify
from tests.chasqui.cli.model.conftest import cut, flip, write_gguf
from tests.command import Run


def wrong(path: Path) -> dict[str, str]:
    """The complaints, by the names of files."""
    found: list[FileCheck] = [*verify(path, lambda _read: None)]
    return {check.path.name: check.text for check in found if not check.whole}


@pytest.fixture
def meta(meta_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(meta_model, tmp_path / "meta"))


@pytest.fixture
def hf(hf_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf_model, tmp_path / "hf"))


def write_sums(folder: Path, program: str, name: str) -> None:
    """Writes a list of checksums as its publisher does."""
    files = sorted(path.name for path in folder.iterdir())
    done = subprocess.run([program, *files], cwd=folder, capture_output=True, check=True)
    (folder / name).write_bytes(done.stdout)


def test_each_file_of_a_whole_model_has_a_line(meta: Path, run: Run) -> None:
    done = run("model", "verify", str(meta))
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["whole"] * 3
    assert "CRC-32" in lines[0]


def test_a_flipped_bit_is_found_by_the_archive(meta: Path, run: Run) -> None:
    flip(meta / "consolidated.01.pth", 100_000)
    done = run("model", "verify", str(meta))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert f"{meta / 'consolidated.01.pth'}: is damaged" in line
    assert "download it again" in line


@pytest.mark.parametrize(
    ("program", "name"), [("md5sum", "checklist.chk"), ("sha256sum", "SHA256SUMS")]
)
def test_a_flipped_bit_is_found_by_a_list(hf: Path, program: str, name: str) -> None:
    write_sums(hf, program, name)
    assert not wrong(hf)
    file = hf / "model-00001-of-00002.safetensors"
    flip(file, file.stat().st_size - 10)
    flip(hf / "tokenizer.model", 100)
    found = wrong(hf)
    assert found.keys() == {file.name, "tokenizer.model"}
    assert name in found[file.name]


def test_a_listed_file_that_is_missing_is_named(meta: Path) -> None:
    write_sums(meta, "md5sum", "checklist.chk")
    (meta / "params.json").unlink()
    assert "checklist.chk lists it" in wrong(meta)["params.json"]


@pytest.mark.parametrize("algorithm", ["sha256", "git"])
def test_a_flipped_bit_is_found_by_the_cache_of_the_hub(
    algorithm: str, hf: Path, tmp_path: Path
) -> None:
    file, blobs = hf / "config.json", tmp_path / "blobs"
    blobs.mkdir()
    content = file.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    name = hashlib.sha256(content) if algorithm == "sha256" else hashlib.sha1(blob)
    file.rename(blobs / name.hexdigest())
    file.symlink_to(Path("..", "blobs", name.hexdigest()))
    assert not wrong(hf)
    file.write_bytes(content + b" ")  # as good as before for JSON
    assert "hub" in wrong(hf)["config.json"]


def test_a_flipped_bit_is_found_in_a_download_of_the_hub(hf: Path) -> None:
    shard = hf / "model-00001-of-00002.safetensors"
    notes = hf / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for file in (shard, hf / "tokenizer.model"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (notes / f"{file.name}.metadata").write_text(f"abc\n{digest}\n1700000000\n")
    assert not wrong(hf)
    flip(shard, shard.stat().st_size - 10)
    flip(hf / "tokenizer.model", 100)
    assert wrong(hf).keys() == {shard.name, "tokenizer.model"}


def test_missing_and_truncated_shards_are_named(hf: Path) -> None:
    cut(hf / "model-00001-of-00002.safetensors", 4)
    (hf / "model-00002-of-00002.safetensors").unlink()
    found = wrong(hf)
    assert "is cut short" in found["model-00001-of-00002.safetensors"]
    assert "not found" in found["model-00002-of-00002.safetensors"]


def test_an_index_that_contradicts_a_file_is_named(hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model.norm.weight", "model.norms.weight"))
    assert "model.norms.weight" in wrong(hf)[index.name]


def test_tensors_beyond_the_end_of_a_gguf_file_are_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    assert not wrong(file)
    cut(file, 4)
    assert "token_embd.weight ends at byte" in wrong(file)["model.gguf"]
