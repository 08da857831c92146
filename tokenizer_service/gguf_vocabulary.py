"""The tokenizer in a GGUF file. Its keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from llama.model_files import (
    ModelFileError,
    answer_end_ids,
    gguf_metadata,
    vocabulary_fingerprint,
)
from tokenizer_service.tokenizer import Tokenizer, Vocabulary
from tokenizer_service.tokenizer_json import special_ids
from tokenizer_service.vocabularies.byte_pairs import BytePairVocabulary
from tokenizer_service.vocabularies.control_names import is_control_name
from tokenizer_service.vocabularies.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from tokenizer_service.vocabularies.sentencepiece_model import SPACE_SYMBOL, SentencePieceVocabulary
from tokenizer_service.vocabularies.sentencepiece_proto import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    serialize_model,
)

T = TypeVar("T")


def read_gguf(path: Path) -> Tokenizer:
    """The tokenizer in this file; ModelFileError if it has none, or one that is not supported."""
    metadata = gguf_metadata(path)
    try:
        return _read(_Keys(metadata), path)
    except ValueError as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} has no usable tokenizer: {error}") from error


class _Keys:
    """The keys below tokenizer.ggml; ValueError names one that is missing or wrong."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise ValueError(f"it lacks tokenizer.ggml.{key}")
        if not _is(value, kind):
            raise ValueError(f"tokenizer.ggml.{key} is no {kind.__name__}")
        return value

    def list_of(self, key: str, kind: type[T], length: int | None = None) -> list[T]:
        values = self.get(key, list)
        if not all(_is(each, kind) for each in values):
            raise ValueError(f"tokenizer.ggml.{key} holds other values than {kind.__name__}")
        if length is not None and len(values) != length:
            raise ValueError(f"tokenizer.ggml.{key} has {len(values)} values for {length} tokens")
        return values

    def token_id(self, key: str, default: int = -1) -> int:
        return max(self.get(f"{key}_token_id", int, default), -1)

    def tokens(self) -> list[str]:
        tokens = self.list_of("tokens", str)
        if twice := next((each for each, count in Counter(tokens).items() if count > 1), None):
            raise ValueError(f"tokenizer.ggml.tokens has {twice[:64]!r} twice")
        return tokens


def _is(value: object, kind: type[T]) -> TypeGuard[T]:
    """Whether a value is of a kind; booleans are no integers in GGUF."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _read(keys: _Keys, path: Path) -> Tokenizer:
    vocabulary: Vocabulary
    match keys.get("model", str):
        case "llama":
            bos, eos, adds_bos = keys.token_id("bos", 1), keys.token_id("eos", 2), True
            vocabulary = _sentencepiece(keys, (bos, eos))
        case "gpt2":
            pre_tokenizer = _pre_tokenizer(keys)
            bos, eos = keys.token_id("bos"), keys.get("eos_token_id", int)
            adds_bos = pre_tokenizer.adds_bos
            vocabulary = _byte_pairs(keys, pre_tokenizer, (bos, eos))
        case other:
            raise ValueError(f'tokenizer.ggml.model is "{other}"; "llama" and "gpt2" are supported')
    return Tokenizer(
        vocabulary,
        special_ids(
            path,
            bos=bos if keys.get("add_bos_token", bool, adds_bos) else -1,
            eos=eos,
            pad=keys.token_id("padding"),
            ends=answer_end_ids(path),
            count=len(vocabulary.pieces),
        ),
        fingerprint=vocabulary_fingerprint(dict(keys.metadata)),
        chat_template=str(keys.metadata.get("tokenizer.chat_template", "")),
    )


def _kinds(keys: _Keys, tokens: Sequence[str], control_ids: Sequence[int]) -> list[int]:
    """The type of each token; control tokens are those that llama.cpp takes for some."""
    kinds = keys.list_of("token_type", int, len(tokens))
    return [
        CONTROL
        if kind in (NORMAL, USER_DEFINED) and (token_id in control_ids or is_control_name(token))
        else kind
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    ]


def _sentencepiece(keys: _Keys, control_ids: Sequence[int]) -> SentencePieceVocabulary:
    """The SentencePiece model from which the file was made."""
    tokens = keys.tokens()
    kinds = _kinds(keys, tokens, control_ids)
    if UNKNOWN not in kinds:
        unknown = keys.token_id("unknown", 0)
        if not 0 <= unknown < len(kinds):
            raise ValueError(f"tokenizer.ggml.unknown_token_id {unknown} is the id of no token")
        kinds[unknown] = UNKNOWN
    scores = keys.list_of("scores", float, len(tokens))
    # Tokens that were added to the model have spaces where its own have their symbol.
    pieces = (
        token.replace(" ", SPACE_SYMBOL) if kind == USER_DEFINED else token
        for token, kind in zip(tokens, kinds, strict=True)
    )
    model = serialize_model(
        zip(pieces, scores, kinds, strict=True),
        dummy_prefix=keys.get("add_space_prefix", bool, True),
        removes_spaces=keys.get("remove_extra_whitespaces", bool, False),
    )
    return SentencePieceVocabulary(model)


def _pre_tokenizer(keys: _Keys) -> PreTokenizer:
    name = keys.get("pre", str)
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f'tokenizer.ggml.pre is "{name}", and only {", ".join(PRE_TOKENIZERS)} are supported; '
            "use the tokenizer.json of the model"
        )
    return PRE_TOKENIZERS[name]


def _byte_pairs(
    keys: _Keys, pre_tokenizer: PreTokenizer, control_ids: Sequence[int]
) -> BytePairVocabulary:
    tokens = keys.tokens()
    kinds = _kinds(keys, tokens, control_ids)
    added = [
        {
            "id": token_id,
            "content": token,
            "special": kind in (CONTROL, UNKNOWN, UNUSED),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != NORMAL
    ]
    return BytePairVocabulary(
        {
            "added_tokens": added,
            "pre_tokenizer": pre_tokenizer.description(),
            "decoder": {"type": "ByteLevel"},
            "model": {
                "type": "BPE",
                "vocab": {token: token_id for token_id, token in enumerate(tokens)},
                "merges": keys.list_of("merges", str),
                "ignore_merges": pre_tokenizer.ignore_merges,
            },
        }
    )
