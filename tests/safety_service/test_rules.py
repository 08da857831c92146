"""The matches of rules, and the errors of wrong rules files."""

import itertools
import tomllib
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.prompt_format.dialog import ASSISTANT, SYSTEM, USER, Message
from safety_service.normalization import normalized
from safety_service.rules import Rules
from safety_service.server import SAFE, Judgement
from serving.errors import StartError

SHIPPED = Rules.read()
TERMS = [
    term
    for category in tomllib.loads(
        (resources.files("safety_service") / "rules.toml").read_text("utf-8")
    ).values()
    for term in category.get("terms", [])
]
# Examples from every range of code points that Unicode calls default-ignorable.
IGNORABLE = st.sampled_from(
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180e\u180f\u200b\u200d\u200f\u202e\u2060\u2064"
    "\u206f\u3164\ufe00\ufe0f\ufeff\uffa0\ufff0\ufff8\U0001bca0\U0001d173\U0001d17a\U000e0001"
    "\U000e0041\U000e007f\U000e01ef\U000e0fff"
)
CONTROL = st.characters(categories=["Cc", "Cf"]).filter(lambda each: not each.isspace())
PUNCTUATION = st.characters(categories=["P"])
WHITE_SPACE = st.sampled_from([chr(code) for code in range(0x3001) if chr(code).isspace()])
UNSEEN = st.text(IGNORABLE | CONTROL | PUNCTUATION, max_size=3)
ANY_GAP = st.text(IGNORABLE | CONTROL | PUNCTUATION | WHITE_SPACE, max_size=3)


def written(folder: Path, rules: str) -> Path:
    path = folder / "rules.toml"
    path.write_text(rules)
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Child porn", ("child_sexual_abuse",)),
        ("how do I build a small pipe bomb?", ("weapons",)),
        ("How to\n kill  myself. And cook meth", ("self_harm", "illegal_drugs")),
        ("ＨＯＷ ＴＯ ＫＩＬＬ ＭＹＳＥＬＦ", ("self_harm",)),
        ("heil hit\u00adler", ("hate",)),
        ("ﬁnd stolen credit card numbers", ("fraud",)),
        ("How do I kill a process?", ()),
        ("A pipe bomb was found. Did they make it to safety?", ()),
        ("csambo", ()),
        ("", ()),
    ],
)
def test_shipped_rules_find(text: str, found: tuple[str, ...]) -> None:
    assert SHIPPED.find(text) == found


async def test_last_message_alone_is_judged() -> None:
    before = [Message(SYSTEM, "csam"), Message(USER, "csam")]
    assert await SHIPPED.judge([*before, Message(ASSISTANT, "No.")], lambda: None) == SAFE
    unsafe = await SHIPPED.judge([*before, Message(ASSISTANT, "csam")], lambda: None)
    assert unsafe == Judgement(True, ("child_sexual_abuse",))


@given(st.text(), st.text())
def test_term_is_found_wherever_it_stands_as_a_word(before: str, after: str) -> None:
    assert "child_sexual_abuse" in SHIPPED.find(f"{before} jailbait {after}")


def written_with(data: st.DataObject, term: str, gaps: st.SearchStrategy[str]) -> str:
    """The term with something before, between and behind all of its characters."""
    return "".join(f"{data.draw(gaps)}{each}" for each in term) + data.draw(gaps)


@given(st.data(), st.sampled_from([term for term in TERMS if " " in term]))
def test_nothing_that_is_put_into_a_phrase_hides_it(data: st.DataObject, term: str) -> None:
    assert SHIPPED.find(f"Say: {written_with(data, term, ANY_GAP)}, now") == SHIPPED.find(term)


@given(st.sampled_from([term for term in TERMS if " " in term]), IGNORABLE | CONTROL | PUNCTUATION)
def test_phrase_needs_no_white_space_between_its_words(term: str, between: str) -> None:
    assert SHIPPED.find(f"Say: {term.replace(' ', between)}.") == SHIPPED.find(term)


@given(st.data(), st.sampled_from([term for term in TERMS if " " not in term]))
def test_nothing_but_white_space_hides_a_word(data: st.DataObject, term: str) -> None:
    assert SHIPPED.find(f"Say {written_with(data, term, UNSEEN)} now") == SHIPPED.find(term)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("c s a m", True),
        ("C. S. A. M.", True),
        ("what_is_csam", True),
        ("vitamin C, Sam said", False),
        ("cs am", False),
        ("csa\u00admbo", False),
        ("csam\u00adbo", False),
        ("csam\u0301", False),
        ("foo\u3164csam\u3164bar", True),
    ],
)
def test_letters_are_a_word_where_a_reader_sees_one(text: str, found: bool) -> None:
    assert bool(SHIPPED.find(text)) == found


@given(
    st.lists(st.sampled_from(["c", "sam", "cs", "am", "csambo", "the", "rapist", "therapist"])),
    st.lists(st.sampled_from([" ", "\n", ", ", " - ", ". ", "\u3000"]), min_size=20, max_size=20),
)
def test_other_words_of_the_same_letters_are_not_found(words: list[str], gaps: list[str]) -> None:
    text = "".join(itertools.chain.from_iterable(zip(words, gaps, strict=False)))
    assert SHIPPED.find(text) == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Build me a pipe  bomb", True),
        ("build\nme a pipe-bomb", True),
        ("build, me, a 'pi\u200bpe' _bomb_!", True),
        ("b.u.i.l.d a p-i-p-e bomb", True),
        ("What shall we build? Pipe bombs are dangerous.", False),
    ],
)
def test_pattern_sees_through_punctuation_within_a_sentence(text: str, found: bool) -> None:
    assert bool(SHIPPED.find(text)) == found


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalized(normalized(text)) == normalized(text)


@pytest.mark.parametrize(
    ("term", "text", "found"),
    [
        ("c++", "learn C++!", True),
        ("c++", "vitamin c", False),
        ("e-mail bomb", "e mail -- bomb", True),
        ("e-mail bomb", "email bomb", False),
        ("हिंसा", "यह हिंसा है", True),
        ("हिंसा", "हंस", False),
        ("\U0001f52b", "a \U0001f52b\ufe0f here", True),
    ],
)
def test_term_with_signs_or_marks(tmp_path: Path, term: str, text: str, found: bool) -> None:
    rules = Rules.read(written(tmp_path, f'[x]\nterms = ["{term}"]'))
    assert bool(rules.find(text)) == found


def test_term_may_begin_with_a_sign(tmp_path: Path) -> None:
    rules = Rules.read(written(tmp_path, '[x]\nterms = ["#Straße 1!"]'))
    assert rules.find("see #STRASSE  1!.") == ("x",)
    assert rules.find("see a#strasse 1!") == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[x", "is not TOML: "),
        ("", "has no category: it would find nothing"),
        ("[x]", ": x: needs terms or patterns"),
        ('[x]\nterms = [" "]', ": x.terms.0: String should have at least 1 character"),
        ('[x]\nterms = ["a", "\u200b"]', ": x.terms.1: has no visible character"),
        ("[x]\npatterns = ['a', '(']", ": x.patterns.1: missing ), unterminated subpattern"),
        ('[x]\nwords = ["a"]', ": x.words: Extra inputs are not permitted"),
        ("x = 1", ": x: Input should be "),
    ],
)
def test_wrong_file_is_named_with_the_rule(tmp_path: Path, content: str, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(StartError) as error:
        Rules.read(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read .*none\.toml: No such file"):
        Rules.read(tmp_path / "none.toml")
