"""Small models in each format, whole and broken in ways that people meet."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from model_service.offline.conversion.convert import ConversionOptions, convert
from tests.command import GOLDEN

CHECKPOINT = GOLDEN / "checkpoints" / "gqa-mp2"


@pytest.fixture(scope="session")
def meta_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Meta's format: two files, and the tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "meta"
    shutil.copytree(CHECKPOINT, folder)
    shutil.copyfile(GOLDEN / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def hf_model(meta_model: Path) -> Path:
    """The same model in Hugging Face's format: an index and two files."""
    folder = meta_model.with_name("hf")
    convert(meta_model, folder, ConversionOptions("hf", file_bytes=600_000))
    (folder / "SHA256SUMS").unlink()
    return folder


def write_gguf(path: Path, architecture: str = "llama") -> Path:
    """A file with one tensor and no more metadata than its architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path, size: int = 1000) -> None:
    """Takes the last bytes off, as an interrupted download."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - size)


def flip(path: Path, position: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


Break = Callable[[Path], None]
