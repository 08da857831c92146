"""The files of a checkpoint: the format of its weights, the tokenizer, the chat template, and the
ids that end an answer. A path names a file, or a folder that has one.
"""

import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from llama.gguf_header import MAGIC, GgufError, read_metadata

META: Final = "Meta's format"
HUGGING_FACE: Final = "Hugging Face's format"
GGUF: Final = "GGUF"
ACCEPTED = (
    "name a folder with Meta's params.json and consolidated.*.pth, or with Hugging Face's "
    "config.json and model.safetensors (or model.safetensors.index.json and its files), or a GGUF "
    "file"
)
# In the order in which they are looked for: tokenizer.json also has the tokens that a fine-tuning
# added, which the tokenizer.model beside it lacks.
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
_GGUF_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def weight_format(path: Path) -> str | None:
    """The format of the weights at `path`, a folder or a file; None if there are none."""
    if not path.is_dir():
        return GGUF if path.suffix == ".gguf" else None
    # Some Hugging Face folders hold a params.json as well.
    if any(path.glob("consolidated.*.pth")):
        return META
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        return HUGGING_FACE
    # Folders with GGUF files often have a config.json as well.
    if (path / "params.json").exists() and not (path / "config.json").exists():
        return META
    if any(path.glob("*.gguf")):
        return GGUF
    return HUGGING_FACE if (path / "config.json").exists() else None


def no_weights(path: Path) -> str:
    """The reason why `weight_format` finds none at `path`."""
    if not path.exists():
        return "not found"
    return "holds no checkpoint" if path.is_dir() else "is a file of a kind that is not read"


class ModelFileError(ValueError):
    """A file cannot be used. The message names it and says what to do."""


class TokenizerForm(Enum):
    """How a file describes a tokenizer."""

    SENTENCEPIECE = "SentencePiece model"
    TOKENIZER_JSON = "tokenizer.json"
    GGUF = "GGUF vocabulary"


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A file with a tokenizer."""

    path: Path
    form: TokenizerForm


def find_tokenizer(path: Path) -> TokenizerFile:
    """The tokenizer's file: `path` itself, or the one in the folder `path`.

    Raises:
        ModelFileError: there is none, it cannot be read, or a folder has several GGUF files.
    """
    file = _in_folder(path) if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        raise ModelFileError(
            f"cannot read {file}: {error.strerror}; tokenizer_path must name the tokenizer that "
            "came with the checkpoint: a tokenizer.model, a tokenizer.json, a GGUF file, or a "
            "folder with one of them"
        ) from error
    if start == MAGIC or file.suffix == ".gguf":
        return TokenizerFile(file, TokenizerForm.GGUF)
    if start.startswith(b"{") or file.suffix == ".json":
        return TokenizerFile(file, TokenizerForm.TOKENIZER_JSON)
    return TokenizerFile(file, TokenizerForm.SENTENCEPIECE)


def _in_folder(folder: Path) -> Path:
    for name in TOKENIZER_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.gguf"))
    if not found:
        names = ", ".join(TOKENIZER_NAMES)
        raise ModelFileError(
            f"{folder} has no tokenizer: looked for {names} and *.gguf; name the folder or the "
            "file of the tokenizer that came with the checkpoint"
        )
    if len(found) > 1:
        raise ModelFileError(f"{folder} has {len(found)} GGUF files: name one, as {found[0]}")
    return found[0]


def tokenizer_fingerprint(path: Path) -> str:
    """SHA-256, hexadecimal, of all that determines the ids: the file, or a GGUF file's vocabulary.

    Files of one model in several quantizations have the same.
    """
    found = find_tokenizer(path)
    if found.form is TokenizerForm.GGUF:
        return vocabulary_fingerprint(gguf_metadata(found.path))
    return hashlib.sha256(found.path.read_bytes()).hexdigest()


def vocabulary_fingerprint(metadata: dict[str, Any]) -> str:
    """`tokenizer_fingerprint` of a GGUF file's metadata."""
    vocabulary = {key: metadata[key] for key in metadata if key.startswith("tokenizer.ggml.")}
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


def gguf_metadata(path: Path) -> dict[str, Any]:
    """`read_metadata`, with a `ModelFileError` that names the file."""
    try:
        return read_metadata(path)
    except GgufError as error:
        raise ModelFileError(
            f"{path} is damaged or not a GGUF file: it {error}; download it again"
        ) from error


def max_embedding_rows(tokens: int) -> int:
    """The most rows that the embedding of a model with this many tokens may have.

    Many embeddings are padded with rows that no token has. deepseek-llm-7b has 2.4 % more rows than
    tokens, 102,400 for 100,015, and one in twenty is allowed. A model may choose the ids of such
    rows: they decode to nothing.
    """
    return tokens + tokens // 20


def embedding_fits(rows: int, tokens: int) -> bool:
    """Whether a model whose embedding has this many rows can belong to a tokenizer."""
    return tokens <= rows <= max_embedding_rows(tokens)


def chat_template(path: Path) -> str:
    """The Jinja template of a dialog; empty where the files have none.

    A folder's chat_template.jinja goes before the template in its tokenizer_config.json, as in
    transformers. Among several templates, the one named "default" is meant.
    """
    found = find_tokenizer(path)
    if found.form is TokenizerForm.GGUF:
        template = gguf_metadata(found.path).get("tokenizer.chat_template", "")
        return template if isinstance(template, str) else ""
    folder = found.path.parent
    if (folder / "chat_template.jinja").is_file():
        return _text(folder / "chat_template.jinja")
    template = tokenizer_config(path).get("chat_template")
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict)]
        template = next(
            (each.get("template") for each in named if each.get("name") == "default"), ""
        )
    if not isinstance(template, str):
        return ""
    try:
        template.encode()
    except UnicodeEncodeError as error:  # JSON can write a lone surrogate
        raise ModelFileError(
            f"{folder / 'tokenizer_config.json'}: chat_template is not valid unicode: {error}; "
            "download it again"
        ) from error
    return template


def answer_end_ids(path: Path) -> tuple[int, ...]:
    """The ids that end an answer, by the files beside the tokenizer; empty where they name none.

    They are `eos_token_id` of generation_config.json, or else of config.json, and the ids of the
    ends of text, turn and message in a GGUF file.
    """
    found = find_tokenizer(path)
    if found.form is TokenizerForm.GGUF:
        metadata = gguf_metadata(found.path)
        named = [metadata.get(f"tokenizer.ggml.{key}") for key in _GGUF_EOS_KEYS]
        # -1 stands for a token that the model lacks.
        return tuple(dict.fromkeys(each for each in named if type(each) is int and each >= 0))
    for name in ("generation_config.json", "config.json"):
        ids = _json_object(found.path.parent / name).get("eos_token_id")
        if ids is not None:
            return _ids(ids, found.path.parent / name)
    return ()


def tokenizer_config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer's file; empty where there is none."""
    return _json_object(find_tokenizer(path).path.parent / "tokenizer_config.json")


def _ids(value: object, path: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise ModelFileError(f"{path}: eos_token_id must be an id or a list of ids, not {value!r}")
    return tuple(dict.fromkeys(ids))


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} must hold a JSON object; download it again")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is not UTF-8; download it again") from error
