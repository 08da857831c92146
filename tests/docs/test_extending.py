"""The lists of files in docs/extending.md name those that an existing addition of the kind has."""

import re
import subprocess

import pytest

from tests.docs.markdown import ROOT

PATH = re.compile(r"`((?:[\w.]+/)+[\w.]+\.(?:md|proto|py))`")
# Where the words of an existing addition do not stand: generated, or not part of the product.
ELSEWHERE = (":!llama/v1", ":!bench", ":!demo", ":!tests")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("A sampling parameter", r"\bmin_p\b"),
        ("An RPC", r"\b(RenderPrompt|render_prompt)"),
        ("A prompt format", r"\bZEPHYR(_MARKS)?\b|\"zephyr\""),
    ],
)
def test_list_has_every_file_of_an_addition_that_there_is(section: str, words: str) -> None:
    missing = files_with(words) - set(PATH.findall(page_section(section)))
    assert not missing


def test_files_of_the_lists_exist() -> None:
    paths = PATH.findall((ROOT / "docs" / "extending.md").read_text("utf-8"))
    made_by_the_reader = ("NAME.py", "plain.py", "plain_attention.py")
    assert [path for path in paths if not (ROOT / path).exists()] == [
        path for path in paths if path.endswith(made_by_the_reader)
    ]


def files_with(words: str) -> set[str]:
    found = subprocess.run(
        ["git", "grep", "-lP", words, "--", "*.py", "*.proto", *ELSEWHERE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(found.stdout.splitlines())


def page_section(title: str) -> str:
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    [section] = [each for each in page.split("\n## ") if each.startswith(f"{title}\n")]
    return section
