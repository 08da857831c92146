"""Streamed text on a terminal, which a small terminal emulator shows here."""

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chasqui.cli.wrapping import WordWrap

COLUMNS = 24


def screen(written: str, columns: int) -> list[str]:
    """The rows of a terminal; one that was full and goes on in the next ends with a backslash."""
    rows: list[list[str]] = [[]]
    full: set[int] = set()
    column = 0
    for back, character in re.findall(r"\x1b\[(\d+)D|(.)", written, re.DOTALL):
        if back:
            column -= int(back)
            assert column >= 0
        elif character == "\n":
            rows.append([])
            column = 0
        else:
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if column + cells > columns:
                full.add(len(rows) - 1)
                rows.append([])
                column = 0
            rows[-1][column : column + cells] = [character, *[""] * (cells - 1)]
            column += cells
    return ["".join(row) + "\\" * (number in full) for number, row in enumerate(rows)]


def streamed(text: str, chunk: int, columns: int = COLUMNS) -> str:
    wrap = WordWrap(lambda: columns)
    return "".join(wrap(text[at : at + chunk]) for at in range(0, len(text), chunk))


def words_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.split("\n")]


TEXT = st.text(st.sampled_from("aaabé 　 \n日。"), max_size=120)


@given(text=TEXT, chunk=st.integers(1, 9))
@example(text="a" * 22 + " bb" * 30, chunk=2)
@example(text="a" * 23 + " b", chunk=1)
@example(text="a" * 60, chunk=3)
@example(text="a" * 21 + "日a", chunk=1)
@example(text="a" * 7 + "\u3000" * 7 + "。a", chunk=1)
def test_copied_text_has_the_words_and_line_breaks_of_the_model(text: str, chunk: int) -> None:
    copied = "\n".join(screen(streamed(text, chunk), COLUMNS)).replace("\\\n", "")
    assert words_of(copied) == words_of(text)


@given(words=st.lists(st.text("abé", min_size=1, max_size=COLUMNS - 1)), chunk=st.integers(1, 9))
def test_no_word_that_fits_a_line_is_broken(words: list[str], chunk: int) -> None:
    rows = screen(streamed(" ".join(words), chunk), COLUMNS)
    assert " ".join(row.removesuffix("\\") for row in rows).split() == words


def test_words_begin_again_on_the_next_line() -> None:
    assert screen(streamed("Llamas carry loads of up to a third of their weight.", 3), 24) == [
        "Llamas carry loads of   \\",
        "up to a third of their  \\",
        "weight.",
    ]


def test_a_word_that_no_line_holds_is_left_to_the_terminal() -> None:
    rows = screen(streamed(f"See {'x' * 30} there", 4), 24)
    assert rows == ["See" + " " * 21 + "\\", "x" * 24 + "\\", "xxxxxx there"]


def test_lines_of_wide_characters_break_anywhere() -> None:
    assert screen(streamed("羊驼" * 8 + " ok", 3), 24) == ["羊驼" * 6 + "\\", "羊驼羊驼 ok"]


@pytest.mark.parametrize("columns", [0, 19])
def test_a_terminal_without_room_is_left_alone(columns: int) -> None:
    assert streamed("some words " * 9, 4, columns) == "some words " * 9
