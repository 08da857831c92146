"""One SentencePiece model in three forms: the same ids and texts."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llama.v1.tokenizer_pb2 import PIECE_KIND_CONTROL
from tests.tokenizer_service.forms import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    llama_gguf,
    llama_tokenizer_json,
    sentencepiece_kinds,
    write_gguf,
)
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.tokenizer import ControlTokenError, Tokenizer

ROOT = Path(__file__).parents[2]
LLAMA_2 = ROOT.parent / "shared" / "data" / "llama2-tokenizer.model"
MODELS = {
    "demonstration": ROOT / "demo" / "checkpoint" / "tokenizer.model",
    "golden": ROOT / "tests" / "golden" / "tokenizer.model",
    "Llama 2": LLAMA_2,
}
END_OF_TURN = "<|im_end|>"

SPECIAL = st.sampled_from(
    ["<s>", "</s>", "<unk>", END_OF_TURN, "<0x0A>", "[INST]", "\u2581", "\0", " ", "\n", "🦙", "é"]
)
TEXTS = st.lists(st.text() | SPECIAL | st.text("\u2581 ") | st.text("</unks>")).map("".join)
# As many as a run of the tests allows; HYPOTHESIS_EXAMPLES=10000 for a long one.
MANY = settings(max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "300")), deadline=None)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> SentencePieceProcessor:
    path = MODELS[request.param]
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def forms(
    model: SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tokenizer]:
    """The model as a tokenizer.json and as a GGUF file."""
    folder = tmp_path_factory.mktemp("forms")
    return {
        "json": open_tokenizer(llama_tokenizer_json(model, folder / "tokenizer.json")),
        "gguf": open_tokenizer(llama_gguf(model, folder / "model.gguf")),
    }


@MANY
@given(text=TEXTS, bos=st.booleans(), eos=st.booleans())
def test_ids_are_sentencepieces(
    forms: dict[str, Tokenizer], model: SentencePieceProcessor, text: str, bos: bool, eos: bool
) -> None:
    expected = model.Encode(text, add_bos=bos, add_eos=eos)
    for form, tokenizer in forms.items():
        assert tokenizer.encode(text, bos=bos, eos=eos) == expected, form


def test_ids_of_whole_files_are_sentencepieces(
    forms: dict[str, Tokenizer], model: SentencePieceProcessor
) -> None:
    texts = [path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))]
    for text in texts:
        expected = model.Encode(text)
        for form, tokenizer in forms.items():
            assert tokenizer.encode(text, bos=False, eos=False) == expected, form


@MANY
@given(data=st.data())
def test_texts_are_sentencepieces(
    forms: dict[str, Tokenizer], model: SentencePieceProcessor, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, len(model) - 1)))
    expected = model.Decode(ids)
    for form, tokenizer in forms.items():
        assert tokenizer.decode(ids) == expected, form


def test_vocabulary_is_that_of_the_sentencepiece_model(
    forms: dict[str, Tokenizer], model: SentencePieceProcessor, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.serialized_model_proto())
    original = open_tokenizer(path)
    for tokenizer in forms.values():
        assert tokenizer.vocabulary() == original.vocabulary()
        assert tokenizer.max_token_bytes == original.max_token_bytes
        assert (tokenizer.dummy_prefix, tokenizer.byte_level) == (True, False)
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids)
        assert ids == (1, 2, -1, (2,))


# A text behind each control token, and the same as one text in which `tokenizers` finds them.
PARTS = st.lists(
    st.tuples(
        st.sampled_from(["<s>", "</s>", END_OF_TURN]),
        TEXTS.filter(lambda text: not any(name in text for name in ("<s>", "</s>", "<unk>", "<|"))),
    ),
    max_size=4,
)


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "prefix at the start"])
def tuned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer.json with one more control token, read by the service and by the library."""
    path = tmp_path_factory.mktemp("tuned") / "tokenizer.json"
    golden = SentencePieceProcessor(model_file=str(MODELS["golden"]))
    llama_tokenizer_json(golden, path, legacy=request.param, extra=[END_OF_TURN])
    return open_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))


@MANY
@given(start=TEXTS.filter(lambda text: "<" not in text), parts=PARTS)
@example(start="", parts=[("<s>", " a"), (END_OF_TURN, ""), (END_OF_TURN, "a")])
@example(start="a", parts=[("<s>", "\u2581a")])
def test_segments_have_the_ids_of_the_rendered_template(
    tuned: tuple[Tokenizer, tokenizers.Tokenizer], start: str, parts: list[tuple[str, str]]
) -> None:
    tokenizer, library = tuned
    rendered = start + "".join(name + text for name, text in parts)
    ids = tokenizer.encode(start, bos=True, eos=False)
    for name, text in parts:
        ids += tokenizer.encode(text, bos=False, eos=False, control_token=name)
    assert ids == library.encode(rendered).ids


@MANY
@given(text=TEXTS, after=st.sampled_from(["", "<s>", END_OF_TURN]))
def test_no_text_has_the_id_of_a_control_token(
    tuned: tuple[Tokenizer, tokenizers.Tokenizer], text: str, after: str
) -> None:
    tokenizer, _ = tuned
    ids = tokenizer.encode(text, bos=False, eos=False, control_token=after)
    assert not set(tokenizer.control_ids.values()) & set(ids[len(after) > 0 :])
    assert 0 not in ids


def test_merges_do_not_lead_to_a_control_token(
    tmp_path: Path, reference: SentencePieceProcessor
) -> None:
    path = llama_tokenizer_json(reference, tmp_path / "tokenizer.json")
    description = json.loads(path.read_text())
    description["model"]["vocab"] |= {"s>": 560, "<": 561, ">": 562}
    description["model"]["merges"] = [["s", ">"], ["<", "s>"], *description["model"]["merges"]]
    path.write_text(json.dumps(description))
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    assert 1 in library.encode("<s>", add_special_tokens=False).ids  # so the merges do lead there
    assert 1 not in open_tokenizer(path).encode("<s>", bos=False, eos=False)


def test_control_token_that_a_fine_tuning_added_has_its_id(
    tuned: tuple[Tokenizer, tokenizers.Tokenizer],
) -> None:
    tokenizer, library = tuned
    assert tokenizer.n_words == library.get_vocab_size() == 561
    assert tokenizer.control_ids == {"<s>": 1, "</s>": 2, END_OF_TURN: 560}
    assert tokenizer.encode("", bos=True, eos=False, control_token=END_OF_TURN) == [1, 560]
    assert tokenizer.decode([560]) == ""
    with pytest.raises(ControlTokenError, match="no control token '<unk>'"):
        tokenizer.encode("a", bos=False, eos=False, control_token="<unk>")


def chat_gguf(path: Path, kind: int) -> Tokenizer:
    """The golden model with an end of turn of this type, as fine-tuned models have it."""
    golden = SentencePieceProcessor(model_file=str(MODELS["golden"]))
    count = range(len(golden))
    write_gguf(
        path,
        model="llama",
        tokens=[*map(golden.IdToPiece, count), END_OF_TURN],
        scores=[*map(golden.GetScore, count), -1000.0],
        token_type=[*sentencepiece_kinds(golden), kind],
        bos_token_id=1,
        eos_token_id=2,
        eot_token_id=560,
        add_bos_token=False,
        chat_template="{{ messages }}",
    )
    return open_tokenizer(path)


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_end_of_turn_in_a_gguf_file_is_a_control_token(tmp_path: Path, kind: int) -> None:
    tokenizer = chat_gguf(tmp_path / "model.gguf", kind)
    assert tokenizer.vocabulary()[560].kind == PIECE_KIND_CONTROL
    assert tokenizer.control_ids[END_OF_TURN] == 560
    assert 560 not in tokenizer.encode(f"a{END_OF_TURN}b", bos=False, eos=False)
    assert tokenizer.eos_ids == (2, 560)
    assert tokenizer.bos_id == -1
    assert tokenizer.encode("", bos=True, eos=True) == [2]
    assert tokenizer.chat_template == "{{ messages }}"


def test_gguf_file_may_leave_out_the_space_in_front(
    tmp_path: Path, reference: SentencePieceProcessor, tokenizer: Tokenizer
) -> None:
    path = llama_gguf(reference, tmp_path / "model.gguf", add_space_prefix=False)
    bare = open_tokenizer(path)
    assert not bare.dummy_prefix
    assert bare.encode(" a", bos=False, eos=False) == tokenizer.encode("a", bos=False, eos=False)


def test_gguf_file_without_the_type_of_the_unknown_token_is_read(
    tmp_path: Path, reference: SentencePieceProcessor, tokenizer: Tokenizer
) -> None:
    count = range(len(reference))
    kinds = [NORMAL if kind == UNKNOWN else kind for kind in sentencepiece_kinds(reference)]
    path = write_gguf(
        tmp_path / "model.gguf",
        model="llama",
        tokens=[*map(reference.IdToPiece, count)],
        scores=[*map(reference.GetScore, count)],
        token_type=kinds,
    )
    assert open_tokenizer(path).vocabulary() == tokenizer.vocabulary()
