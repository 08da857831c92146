"""The incremental detokenizer, against SentencePiece itself."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokenizers
from tokenizers import decoders, models

from gateway.text.detokenizer import Detokenizer
from gateway.text.vocabulary import PieceKind, Vocabulary
from llama.model_files import max_embedding_rows
from tokenizer_service.tokenizer import Tokenizer
from tokenizer_service.vocabularies.byte_alphabet import CHARACTERS

BOS, EOS, UNKNOWN = 1, 2, 0
FIRST_BYTE = 3
PIECES = 560

EURO = [FIRST_BYTE + byte for byte in "€".encode()]
LLAMA = [FIRST_BYTE + byte for byte in "🦙".encode()]

# Bytes that begin, continue and never are part of a character, in about equal measure.
BYTES = st.one_of(st.integers(0x00, 0x7F), st.integers(0x80, 0xBF), st.integers(0xC0, 0xFF)).map(
    lambda byte: FIRST_BYTE + byte
)
IDS = st.lists(
    st.one_of(
        BYTES,
        st.text(min_size=1, max_size=1).map(lambda c: [FIRST_BYTE + b for b in c.encode()]),
        st.sampled_from([BOS, EOS, UNKNOWN]),
        st.integers(FIRST_BYTE + 256, PIECES - 1),
    ).map(lambda ids: ids if isinstance(ids, list) else [ids]),
    max_size=12,
).map(lambda groups: [token_id for group in groups for token_id in group])


def deltas(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(ids=IDS)
@example(ids=EURO[:2])  # cut off at the end
@example(ids=[*EURO[:2], BOS, EURO[2]])  # interrupted by a control token
@example(ids=[*LLAMA[:3], *EURO])  # by another character
@example(ids=[FIRST_BYTE + byte for byte in b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\x80"])  # forbidden
@example(ids=[FIRST_BYTE + 0x20, 490])  # a byte is no dummy prefix, and a space after it stays
@example(ids=[BOS, 490, 490])  # control tokens do not use up the dummy prefix
@example(ids=[UNKNOWN, 490])
def test_deltas_join_to_sentencepieces_decode(
    tokenizer: Tokenizer, vocabulary: Vocabulary, ids: list[int]
) -> None:
    assert "".join(deltas(vocabulary, ids)) == tokenizer.decode(ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_encoded_text_comes_back_without_replacements(
    tokenizer: Tokenizer, vocabulary: Vocabulary, text: str
) -> None:
    ids = tokenizer.encode(text, bos=True, eos=True)
    # U+2581 is how SentencePiece writes a space: it cannot be told from one.
    assert "".join(deltas(vocabulary, ids)) == text.replace("\u2581", " ")


def test_character_is_told_with_its_last_byte(vocabulary: Vocabulary) -> None:
    assert deltas(vocabulary, [*LLAMA, *EURO]) == ["", "", "", "🦙", "", "", "€", ""]


def test_broken_character_is_told_as_soon_as_it_is_known(vocabulary: Vocabulary) -> None:
    assert deltas(vocabulary, [*LLAMA[:2], LLAMA[0], BOS]) == ["", "", "��", "�", ""]


def test_lone_texts_are_those_of_sentencepiece(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    assert list(vocabulary.lone_texts[:PIECES]) == [tokenizer.decode(i) for i in range(PIECES)]


@pytest.mark.parametrize(("dummy_prefix", "text"), [(True, "a a"), (False, " a a")])
def test_first_space_is_dropped_only_where_it_belongs_to_the_encoding(
    dummy_prefix: bool, text: str
) -> None:
    pieces = [(b" a", PieceKind.NORMAL)]
    vocabulary = Vocabulary.build(pieces, dummy_prefix=dummy_prefix, eos_ids=[0])
    assert "".join(deltas(vocabulary, [0, 0])) == text


def test_rows_that_pad_the_embedding_add_no_text(vocabulary: Vocabulary) -> None:
    assert len(vocabulary) == PIECES
    padding = range(PIECES, max_embedding_rows(PIECES))
    assert len(padding) == 28
    assert "".join(deltas(vocabulary, [*EURO[:2], *padding, *EURO])) == "\ufffd\ufffd€"
    assert {vocabulary.lone_texts[token_id] for token_id in padding} == {""}


# Pieces that begin, continue and never are part of a character, alone and in groups.
BYTE_PIECES = [bytes([byte]) for byte in range(256)] + ["é".encode(), "🦙".encode()[:3], b" a\xe2"]
CONTROL_ID = len(BYTE_PIECES)
BYTE_LEVEL = Vocabulary.build(
    [*((piece, PieceKind.NORMAL) for piece in BYTE_PIECES), (b"", PieceKind.CONTROL)],
    dummy_prefix=False,
    eos_ids=[CONTROL_ID],
    byte_level=True,
)


def library_of_byte_pieces() -> Tokenizers:
    """The same pieces in the library `tokenizers`, for its decoder."""
    characters = {byte: character for character, byte in CHARACTERS.items()}
    names = ["".join(characters[byte] for byte in piece) for piece in BYTE_PIECES]
    library = Tokenizers(models.BPE({name: index for index, name in enumerate(names)}, []))
    library.add_special_tokens(["<|end|>"])
    library.decoder = decoders.ByteLevel()
    return library


LIBRARY = library_of_byte_pieces()
LEAD, REST = "🦙".encode()[:2], "🦙".encode()[2:]


@given(ids=st.lists(st.integers(0x70, CONTROL_ID) | st.integers(0, CONTROL_ID)))
@example(ids=[*LEAD, CONTROL_ID, *REST])  # control tokens are transparent
@example(ids=[*LEAD, *"€".encode()[:2]])
@example(ids=[*b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\x80"])
def test_byte_level_deltas_join_to_the_librarys_decode(ids: list[int]) -> None:
    assert "".join(deltas(BYTE_LEVEL, ids)) == LIBRARY.decode(ids, skip_special_tokens=True)


def test_byte_level_character_is_told_with_its_last_byte() -> None:
    assert deltas(BYTE_LEVEL, [*LEAD, CONTROL_ID, *REST]) == ["", "", "", "", "🦙", ""]
