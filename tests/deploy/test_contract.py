"""The frozen contract: `buf breaking` compares the protos with the committed image of v1."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")
CHAT = Path("protos/llama/v1/chat.proto")

Compare = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Runs `buf breaking` for protos in which a text of chat.proto is replaced."""

    def run(before: str, after: str) -> "subprocess.CompletedProcess[str]":
        shutil.copytree(ROOT / "protos", tmp_path / "protos")
        shutil.copy(ROOT / "buf.yaml", tmp_path)
        chat = (tmp_path / CHAT).read_text()
        assert chat.count(before) == 1
        (tmp_path / CHAT).write_text(chat.replace(before, after))
        command = [str(BUF), "breaking", "--against", "protos/v1.txtpb"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  bool has_special_tags = 6;\n", "", '"has_special_tags" on message'),
        ("  string content = 2;", "  bytes content = 2;", 'type from "string" to "bytes"'),
        ("  ROLE_ASSISTANT = 3;", "  ROLE_MODEL = 3;", '"ROLE_ASSISTANT" to "ROLE_MODEL"'),
    ],
)
def test_change_that_breaks_clients_is_refused(
    compare: Compare, before: str, after: str, message: str
) -> None:
    done = compare(before, after)
    assert done.returncode == 100, done.stderr
    assert message in done.stdout


def test_addition_is_not_refused(compare: Compare) -> None:
    added = "  string content = 2;\n  // The author's name.\n  string name = 3;"
    done = compare("  string content = 2;", added)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
