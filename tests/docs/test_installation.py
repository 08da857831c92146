"""The distribution's name (`chasqui` on PyPI is another project), and the first command."""

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTION = "chasqui-llama"
# Built, installed and generated files are not checked, nor what tools keep from run to run.
NOT_TEXTS = {".git", ".venv", "build", "dist", "node_modules", "results"}
NOT_TEXTS |= {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
SUFFIXES = {"", ".md", ".proto", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
# An option of pip's, such as --quiet, may stand in front of the name.
FROM_AN_INDEX = re.compile(r"""\bpip3? (?:install|download)(?: -\S+)* ["']?chasqui""")


def test_no_text_installs_the_distribution_from_an_index() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _texts(ROOT)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if FROM_AN_INDEX.search(line)
    ]
    assert not found


@pytest.mark.parametrize("line", ["pip install 'chasqui[all]'", "pip install -U chasqui-llama"])
def test_lines_that_would_install_from_an_index_are_recognized(line: str) -> None:
    assert FROM_AN_INDEX.search(line)


def test_extras_refer_to_the_distribution_itself() -> None:
    requirements = metadata.requires(DISTRIBUTION) or []
    ours = [name for name in requirements if name.startswith("chasqui")]
    assert ours
    assert all(name.startswith(f"{DISTRIBUTION}[") for name in ours)


def test_command_tells_the_version_of_the_distribution() -> None:
    [command] = metadata.distribution(DISTRIBUTION).entry_points.select(name="chasqui")
    program = f"from {command.module} import {command.attr} as main; main()"

    shown = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=True
    )

    assert shown.stdout.split()[-1] == metadata.version(DISTRIBUTION)


@pytest.mark.parametrize(
    "question",
    ["it's", 'a "b", (c)', "`id` $(id) $HOME $$ $5", "back\\slash", "#1?", "$(shell id)"],
)
def test_make_chat_asks_exactly_what_is_given(question: str, tmp_path: Path) -> None:
    # -n: the commands are printed, and none is run.
    command = ["make", "-n", "--no-print-directory", "chat"]
    shown = subprocess.run(
        [*command, f"VENV={tmp_path}", f"ASK={question}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    *_, chat = shown.stdout.splitlines()
    assert shlex.split(chat)[1:] == ["chat", "--serve", "--ask", question]


def _texts(folder: Path) -> list[Path]:
    """All text files below a folder that people read or run."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in NOT_TEXTS or path.is_symlink() or path == Path(__file__):
            continue
        if path.is_dir():
            found += _texts(path)
        elif path.suffix in SUFFIXES:
            found.append(path)
    return found
