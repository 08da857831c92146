"""What rules find, and what a wrong rules file is told."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety_service.rules import Rules
from safety_service.servicer import ASSISTANT, SAFE, SYSTEM, USER, Judgement, Message
from serving.errors import StartError

SHIPPED = Rules.read()


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
