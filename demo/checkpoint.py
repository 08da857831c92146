"""Reads and writes the checkpoint: Meta's files, and a manifest of their sources.

The manifest ties weights to text. It holds a digest of every file that training reads and all
settings, and a test compares them, so that an edit of the text without new training is found.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from demo.network import Llama, Shape
from demo.text import HELD_OUT, TEXT
from demo.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"
WEIGHTS, PARAMS, TOKENIZER, MANIFEST = (
    "consolidated.00.pth",
    "params.json",
    "tokenizer.model",
    "manifest.json",
)


def text_digest() -> str:
    """SHA-256 over the training text and the questions held out from it."""
    digest = hashlib.sha256()
    for path in [*sorted({*TEXT.glob("*.toml")} - {HELD_OUT}), HELD_OUT]:
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(folder: Path, model: Llama, tokenizer: bytes, manifest: dict[str, Any]) -> None:
    """Writes a complete checkpoint; the digests of its files are added to the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    torch.save(state, folder / WEIGHTS)
    (folder / TOKENIZER).write_bytes(tokenizer)
    params = {k: v for k, v in asdict(model.shape).items() if k != "vocab_size"}
    (folder / PARAMS).write_text(json.dumps(params | {"vocab_size": -1}, indent=2) + "\n")
    files = {name: file_digest(folder / name) for name in (WEIGHTS, PARAMS, TOKENIZER)}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=2) + "\n")


def read(folder: Path) -> tuple[Llama, Tokenizer]:
    """The network, in float32 and ready to answer, and its tokenizer."""
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    params = json.loads((folder / PARAMS).read_text())
    model = Llama(Shape(**params | {"vocab_size": tokenizer.vocab_size}))
    model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return model.float().eval(), tokenizer
