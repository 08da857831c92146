"""Set-ups that cannot be served: how to make each, the file that is at fault, and the remedy."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.chasqui.cli.model.conftest import change_json, cut, write_gguf
from tests.command import GOLDEN


@dataclass(frozen=True, slots=True)
class Broken:
    """A broken set-up.

    Attributes:
        start: the model that is broken: meta, hf, or nothing for an empty folder.
        damage: breaks it.
        culprit: what the message must name.
        fix: a part of the remedy.
    """

    start: str
    damage: Callable[[Path], object]
    culprit: str
    fix: str


class _Code:
    """An object whose unpickling runs a function."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return __import__("os").system, ("true",)


def _another_tokenizer(folder: Path) -> None:
    shutil.copyfile(
        GOLDEN.parents[1] / "demo" / "checkpoint" / "tokenizer.model", folder / "tokenizer.model"
    )


def _unreadable(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def _file_in_its_place(folder: Path) -> None:
    folder.rmdir()
    folder.touch()


def _several_gguf(folder: Path) -> None:
    write_gguf(folder / "a.gguf")
    write_gguf(folder / "b.gguf")


SHARD = "model-00002-of-00002.safetensors"
BROKEN = {
    "missing folder": Broken("", Path.rmdir, "broken: not found", "name a folder with"),
    "empty folder": Broken("", Path.exists, "holds no checkpoint", "name a folder with"),
    "no tokenizer": Broken(
        "meta",
        lambda folder: (folder / "tokenizer.model").unlink(),
        "has no tokenizer",
        "name the folder or the file of the tokenizer",
    ),
    "tokenizer of another size": Broken(
        "meta", _another_tokenizer, "tokenizer.model: has 1,920 tokens", "came with this model"
    ),
    "damaged tokenizer": Broken(
        "meta", lambda folder: cut(folder / "tokenizer.model"), "tokenizer.model is damaged", "copy"
    ),
    "missing shard of an index": Broken(
        "hf", lambda folder: (folder / SHARD).unlink(), f"{SHARD}: not found", "download"
    ),
    "truncated safetensors": Broken(
        "hf", lambda folder: cut(folder / SHARD), f"{SHARD}: is cut short", "download it again"
    ),
    "missing numbered file": Broken(
        "meta",
        lambda folder: (folder / "consolidated.00.pth").unlink(),
        "consolidated.00.pth: not found",
        "download it again",
    ),
    "truncated .pth": Broken(
        "meta",
        lambda folder: cut(folder / "consolidated.01.pth"),
        "consolidated.01.pth: is cut short",
        "download it again",
    ),
    ".pth with code": Broken(
        "meta",
        lambda folder: torch.save({"a": _Code()}, folder / "consolidated.01.pth"),
        "consolidated.01.pth: refused",
        "use the file from its publisher",
    ),
    "params.json that is not JSON": Broken(
        "meta",
        lambda folder: (folder / "params.json").write_text("{dim: 64}"),
        "params.json: is not JSON",
        "copy it again",
    ),
    "another architecture": Broken(
        "hf",
        lambda folder: change_json(folder / "config.json", model_type="gpt2"),
        "config.json: has model_type 'gpt2'",
        "Llama's architecture",
    ),
    "sliding window": Broken(
        "hf",
        lambda folder: change_json(
            folder / "config.json",
            model_type="mistral",
            architectures=["MistralForCausalLM"],
            sliding_window=1024,
        ),
        "config.json: has sliding_window 1024",
        "sliding_window is null",
    ),
    "GPTQ": Broken(
        "hf",
        lambda folder: change_json(
            folder / "config.json", quantization_config={"quant_method": "gptq"}
        ),
        "gptq",
        "serve the original checkpoint",
    ),
    "GGUF of another architecture": Broken(
        "",
        lambda folder: write_gguf(folder / "model.gguf", "gpt2"),
        "model.gguf: holds a model of the architecture 'gpt2'",
        "use a Llama",
    ),
    "truncated GGUF": Broken(
        "",
        lambda folder: cut(write_gguf(folder / "model.gguf"), 1100),
        "model.gguf: is cut short",
        "download it again",
    ),
    "several GGUF files": Broken("", _several_gguf, "holds several GGUF files", "name one of them"),
    "unreadable file": Broken(
        "hf", _unreadable, "config.json: cannot be read: Is a directory", "readable"
    ),
    "neither folder nor GGUF": Broken(
        "", _file_in_its_place, "is a file of a kind that is not read", "name a folder"
    ),
}
