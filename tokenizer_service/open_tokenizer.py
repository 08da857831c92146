"""Opens the tokenizer of a path, in whichever form its files have it."""

from os import PathLike
from pathlib import Path

from llama.model_files import (
    TokenizerForm,
    answer_end_ids,
    chat_template,
    find_tokenizer,
    tokenizer_fingerprint,
)
from tokenizer_service.gguf_vocabulary import read_gguf
from tokenizer_service.tokenizer import Tokenizer
from tokenizer_service.tokenizer_json import read_tokenizer_json, special_ids
from tokenizer_service.vocabularies.sentencepiece_model import read_sentencepiece


def open_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """The tokenizer in a file or folder.

    Args:
        path: a SentencePiece model (tokenizer.model), a tokenizer.json, a GGUF file, or a folder
            with one of them.

    Raises:
        ModelFileError: there is none, or it cannot be used; the message names the file and the fix.
    """
    found = find_tokenizer(Path(path))
    match found.form:
        case TokenizerForm.TOKENIZER_JSON:
            return read_tokenizer_json(found.path)
        case TokenizerForm.GGUF:
            return read_gguf(found.path)
        case TokenizerForm.SENTENCEPIECE:
            return _read_tokenizer_model(found.path)


def _read_tokenizer_model(path: Path) -> Tokenizer:
    vocabulary = read_sentencepiece(path.read_bytes(), path)
    return Tokenizer(
        vocabulary,
        special_ids(
            path,
            bos=vocabulary.bos_id,
            eos=vocabulary.eos_id,
            pad=vocabulary.pad_id,
            ends=answer_end_ids(path),
            count=len(vocabulary.pieces),
        ),
        fingerprint=tokenizer_fingerprint(path),
        chat_template=chat_template(path),
    )
