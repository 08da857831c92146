"""The house checks of `make lint` pass for a good repository, and each rule of theirs can fail."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[2] / ".ci"
Check = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Runs a check on a repository that holds the given files."""

    def run(name: str, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, "utf-8")
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
        command = [sys.executable, str(CHECKS / f"check_{name}.py"), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_rooms_of_the_largest_size_pass(check: Check) -> None:
    files = {f"gateway/{number}.py": "pass\n" * 400 for number in range(11)}
    assert check("rooms", {**files, "gateway/text/stop_strings.py": ""}).returncode == 0


def test_a_folder_with_too_many_entries_is_named(check: Check) -> None:
    files = {f"gateway/{number}.py": "" for number in range(12)}
    result = check("rooms", {**files, "gateway/text/stop_strings.py": ""})
    assert result.returncode == 1
    assert "gateway/: 13 entries, at most 12" in result.stderr


def test_a_long_source_file_is_named(check: Check) -> None:
    result = check("rooms", {"gateway/server.py": "pass\n" * 401})
    assert result.returncode == 1
    assert "gateway/server.py: 401 lines, at most 400" in result.stderr


def test_tests_and_generated_code_may_fill_folders_and_files(check: Check) -> None:
    folders = ("tests/gateway", "llama/v1")
    files = {f"{folder}/{n}.py": "pass\n" * 401 for folder in folders for n in range(13)}
    assert check("rooms", files).returncode == 0


def page(*references: str) -> str:
    """An architecture page: the references in the first step, nine further steps, and a list."""
    steps = [" ".join(f"`{each}`" for each in references), *["`client/aio.py:stream`"] * 9]
    numbered = "".join(f"{number}. Step {step}.\n" for number, step in enumerate(steps, start=1))
    return f"# Architecture\n\n{numbered}\n- `gateway/metrics.py` is no step.\n"


CLIENT = "class Stream:\n    async def stream(self):\n        pass\n"


def test_the_reading_list_is_printed_with_its_lines(check: Check) -> None:
    files = {"client/aio.py": CLIENT, "gateway/server.py": "def serve():\n    pass\n"}
    references = ("gateway/server.py:serve", "client/aio.py:Stream.stream", "client/aio.py")
    result = check("reading_list", {**files, "docs/architecture.md": page(*references)})
    assert result.returncode == 0
    assert "     3 client/aio.py\n" in result.stdout
    assert "     5 lines in 2 files\n" in result.stdout


@pytest.mark.parametrize(
    ("references", "complaint"),
    [
        (["gateway/gone.py:serve"], "names gateway/gone.py, which does not exist"),
        (["client/aio.py:gone"], "names client/aio.py:gone, which client/aio.py does not define"),
        ([f"gateway/{number}.py" for number in range(24)], "at most 4,000 lines in 24 files"),
        (["gateway/long.py"], "at most 4,000 lines in 24 files"),
        ([], "10 numbered steps must each name"),
    ],
)
def test_a_wrong_reading_list_is_refused(
    check: Check, references: list[str], complaint: str
) -> None:
    files = {f"gateway/{number}.py": "" for number in range(24)}
    files |= {"client/aio.py": CLIENT, "gateway/long.py": "pass\n" * 5000}
    result = check("reading_list", {**files, "docs/architecture.md": page(*references)})
    assert result.returncode == 1
    assert complaint in result.stderr


def test_plain_language_passes(check: Check) -> None:
    result = check(
        "language",
        {
            "gateway/plain.py": '"""A buffer. What it costs? Nothing."""\nunits = 1  # of time\n',
            "docs/plain.md": "# What it is\n\n| What | How |\n|---|---|\n| a | b |\n\n`What` is.\n",
            "protos/plain.proto": "// The answer's text.\nmessage Answer {}\n",
            "llama/v1/generated.py": "MOST_TOKENS = 1\n",
        },
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        (
            "client/a.py",
            "pass\nMOST_TOKENS = 1\n",
            "client/a.py:2: the name MOST_TOKENS was retired",
        ),
        ("client/a.py", "x.take()\n", "the name take was retired; say on_event"),
        ("gateway/a.py", "class Replica:\n    pass\n", "say ReplicaClient or TokenizerClient"),
        (
            "client/a.py",
            '"""A line.\n\nOf a page, two.\n"""\n',
            "a.py:3: not plain English: Of a page",
        ),
        ("client/a.py", "# One. What is\n# left.\n", "a.py:1: not plain English: What is left."),
        ("client/a.py", "x = 1  # Who asks\n", "a.py:1: not plain English: Who asks"),
        ("client/a.py", 'f(help="Nobody " "asks")\n', "a.py:1: not plain English: Nobody"),
        ("docs/a.md", "# A\n\n- whoever asks\n", "docs/a.md:3: not plain English: whoever"),
        ("docs/a.md", "|a|\n|-|\n| Of it |\n", "docs/a.md:3: not plain English: Of it"),
        ("protos/a.proto", "// Of it.\n", "protos/a.proto:1: not plain English: Of it."),
        ("compose.yml", "a: 1 # for strangers\n", "compose.yml:1: not plain English: strangers"),
    ],
)
def test_retired_names_and_sentences_are_named_with_their_line(
    check: Check, path: str, text: str, complaint: str
) -> None:
    result = check("language", {path: text})
    assert result.returncode == 1
    assert complaint in result.stderr
