"""Every code block of every page does what the page says.

A block that cannot run here has a mark, `needs=…`, with one of the words of `NEEDS`.
"""

import subprocess
from pathlib import Path

import pytest

from tests.docs import test_contents
from tests.docs.conftest import StartReading
from tests.docs.markdown import Block, all_pages, read_blocks
from tests.docs.reader import MARKS, NEEDS

PAGES = all_pages()
# Those that everyone reads first; servers start for each page, which takes long.
FIRST = {"README.md", "docs/first_steps.md", "docs/clients/python.md", "docs/clients/http.md"}
EACH = [pytest.param(page, marks=() if page in FIRST else pytest.mark.thorough) for page in PAGES]
# Servers start for several pages.
pytestmark = pytest.mark.long


@pytest.mark.parametrize("page", PAGES)
def test_every_block_can_be_run_or_says_what_it_needs(page: str) -> None:
    complaints = [f"{block}: {reason}" for block in PAGES[page] if (reason := complaint(block))]
    assert not complaints


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", EACH)
def test_blocks_do_what_the_page_says(page: str, start_reading: StartReading) -> None:
    start_reading(PAGES[page]).read()


@pytest.mark.parametrize(
    "text",
    ["```sh\nfalse\ntrue\n```", "```sh\necho 3\n```\n```text output\n4\n```"],
    ids=["a command fails", "another output"],
)
def test_block_that_does_something_else_is_noticed(
    text: str, tmp_path: Path, start_reading: StartReading
) -> None:
    reader = start_reading(written(text, tmp_path))
    with pytest.raises(AssertionError):
        reader.read()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```\necho\n```", "no language"),
        ("    echo\n", "no language"),
        ("```cobol\n```", "no way to run cobol"),
        ("```sh needs=luck\n```", "what is luck?"),
        ("```sh quickly\n```", "what is quickly?"),
        ("```sh\nif\n```", "bash: "),
        ("```text\nhello\n```", "nothing compares it"),
        ("```text checked-by=nothing\nhello\n```", "no test nothing"),
    ],
)
def test_block_without_a_way_to_run_is_noticed(text: str, reason: str, tmp_path: Path) -> None:
    [block] = written(text, tmp_path)
    assert complaint(block).startswith(reason)


def complaint(block: Block) -> str:
    """Why a block can neither be run nor left out; empty when it can."""
    if not block.language:
        return "no language"
    if block.language not in MARKS:
        return f"no way to run {block.language}"
    for mark in block.marks.keys() - MARKS[block.language]:
        return f"what is {mark}?"
    if (need := block.marks.get("needs")) is not None and need not in NEEDS:
        return f"what is {need}?"
    if (test := block.marks.get("checked-by")) is not None and not hasattr(test_contents, test):
        return f"no test {test}"
    if block.language == "sh":
        return _syntax_error(block.text)
    if block.language in {"text", "toml", "yaml"} and not block.marks:
        return "nothing compares it"
    return ""


def _syntax_error(script: str) -> str:
    checked = subprocess.run(
        ["bash", "-n"], input=script, capture_output=True, text=True, check=False
    )
    return checked.stderr


def written(text: str, folder: Path) -> list[Block]:
    path = folder / "page.md"
    path.write_text(text)
    return read_blocks(path, path.name)
