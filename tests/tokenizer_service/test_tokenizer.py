"""The tokenizer itself, compared with SentencePiece."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama.model_files import ModelFileError
from llama.v1.tokenizer_pb2 import (
    PIECE_KIND_BYTE,
    PIECE_KIND_CONTROL,
    PIECE_KIND_NORMAL,
    PIECE_KIND_UNKNOWN,
)
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.tokenizer import TokenIdError, Tokenizer

FIRST_BYTE_ID = 3  # the pieces <0x00> to <0xFF> follow <unk>, <s>, </s>

# Texts that a careless implementation would not treat as plain text.
SPECIAL = st.sampled_from(
    ["<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "\u2581", "\0", " ", "🦙", "é"]
)
# The sign for a space in pieces may also be written in a text.
TEXTS = st.lists(st.text() | SPECIAL | st.text("\u2581 ")).map("".join)


@given(text=TEXTS, bos=st.booleans(), eos=st.booleans())
def test_ids_are_sentencepieces(
    tokenizer: Tokenizer, reference: SentencePieceProcessor, text: str, bos: bool, eos: bool
) -> None:
    expected = reference.Encode(text, add_bos=bos, add_eos=eos)
    assert tokenizer.encode(text, bos=bos, eos=eos) == expected


@given(ids=st.lists(st.integers(0, 559)))
def test_text_is_sentencepieces(
    tokenizer: Tokenizer, reference: SentencePieceProcessor, ids: list[int]
) -> None:
    assert tokenizer.decode(ids) == reference.Decode(ids)


@given(text=TEXTS.filter(lambda text: "\u2581" not in text))
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_empty_text_has_no_ids_of_its_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("", bos=False, eos=False) == []
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]


def test_control_tokens_written_out_are_plain_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s></s>", bos=False, eos=False)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == "<s></s>"


def test_character_without_a_piece_becomes_its_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦙", bos=False, eos=False)
    assert bytes(each - FIRST_BYTE_ID for each in ids[-4:]) == "🦙".encode()


def test_lone_surrogate_is_named_with_its_position(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"character 2 is the lone surrogate U\+D83E"):
        tokenizer.encode("ok\ud83e", bos=True, eos=False)


def test_single_id_decodes_like_a_sequence_of_one(tokenizer: Tokenizer) -> None:
    (*_, last) = tokenizer.encode("llama", bos=False, eos=False)
    assert tokenizer.decode(last) == tokenizer.decode([last]) != ""


@pytest.mark.parametrize("unknown", [-1, 560, 2**31, 2**64])
def test_unknown_id_is_named_with_its_position(tokenizer: Tokenizer, unknown: int) -> None:
    with pytest.raises(TokenIdError) as error:
        tokenizer.decode([5, 6, unknown])
    assert error.value.index == 2
    assert str(error.value) == f"ids[2]: must be from 0 to 559, got {unknown}"


def test_attributes_are_those_of_the_model_file(tokenizer: Tokenizer, model_path: Path) -> None:
    assert tokenizer.n_words == 560
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, -1)
    assert tokenizer.dummy_prefix
    assert tokenizer.fingerprint == hashlib.sha256(model_path.read_bytes()).hexdigest()


def test_vocabulary_holds_what_each_id_adds_to_a_text(tokenizer: Tokenizer) -> None:
    start = tokenizer.encode("a", bos=False, eos=False)
    pieces = tokenizer.vocabulary()
    assert len(pieces) == tokenizer.n_words
    for token_id, piece in enumerate(pieces):
        if piece.kind == PIECE_KIND_BYTE:
            assert piece.bytes == bytes([token_id - FIRST_BYTE_ID])
        else:
            assert tokenizer.decode([*start, token_id]) == "a" + piece.bytes.decode()


def test_vocabulary_tells_kinds_apart(tokenizer: Tokenizer) -> None:
    kinds = [piece.kind for piece in tokenizer.vocabulary()]
    assert kinds[:3] == [PIECE_KIND_UNKNOWN, PIECE_KIND_CONTROL, PIECE_KIND_CONTROL]
    assert set(kinds[3:259]) == {PIECE_KIND_BYTE}
    assert set(kinds[259:]) == {PIECE_KIND_NORMAL}


@given(text=TEXTS)
def test_no_token_stands_for_more_bytes_than_told(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.max_token_bytes == 10
    assert len(tokenizer.encode(text, bos=False, eos=False)) * 10 >= len(text.encode())


def train(path: Path, **options: Any) -> Path:
    """Writes a SentencePiece model of another make than Llama 2's."""
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(["what do llamas eat"] * 10),
        model_writer=model,
        **{"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2, **options},
    )
    path.write_bytes(model.getvalue())
    return path


def test_dummy_prefix_and_padding_are_read_from_the_model(tmp_path: Path) -> None:
    path = train(tmp_path / "other.model", pad_id=3, add_dummy_prefix=False)
    tokenizer = open_tokenizer(path)
    assert tokenizer.pad_id == 3
    assert not tokenizer.dummy_prefix


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False}, None),
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": True}, None),
        ({"byte_fallback": False}, None),
        ({}, 6),  # three letters behind the sign for a space, which has three bytes
    ],
)
def test_tokens_have_a_bound_only_where_no_text_is_left_out(
    tmp_path: Path, options: dict[str, Any], bound: int | None
) -> None:
    llamas = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "vocab_size": 300,
    }
    path = train(tmp_path / "other.model", **{**llamas, **options})
    assert open_tokenizer(path).max_token_bytes == bound


def test_model_without_bos_and_eos_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "other.model", bos_id=-1, eos_id=-1)
    with pytest.raises(ModelFileError, match=r"other\.model .* without BOS or EOS"):
        open_tokenizer(path)
