"""Checks that each folder fits a screen, and each source file a reader's patience.

Run by `make lint`, on the files that git tracks. The limits are for what a newcomer opens, so tests
and generated code are exempt.
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_ENTRIES = 12
MAX_LINES = 400
EXEMPT_FOLDERS = {
    "": "the names at the top are fixed: packages, and files that tools look for there",
    "llama/v1": "generated from protos/",
}


def crowded_folders(paths: list[str]) -> list[str]:
    """The folders that hold too many files and folders, with their number."""
    entries: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        parts = path.split("/")
        for depth, name in enumerate(parts):
            entries["/".join(parts[:depth])].add(name)
    return [
        f"{folder}/: {len(names)} entries, at most {MAX_ENTRIES}"
        for folder, names in sorted(entries.items())
        if len(names) > MAX_ENTRIES and folder not in EXEMPT_FOLDERS
    ]


def long_files(root: Path, paths: list[str]) -> list[str]:
    """The source files that are too long, with their length."""
    lengths = {
        path: len((root / path).read_text("utf-8").splitlines())
        for path in paths
        if path.endswith(".py") and path.rpartition("/")[0] not in EXEMPT_FOLDERS.keys() - {""}
    }
    return [
        f"{path}: {lines} lines, at most {MAX_LINES}"
        for path, lines in lengths.items()
        if lines > MAX_LINES
    ]


def main(root: Path = ROOT) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    )
    tracked = [path for path in listed.stdout.splitlines() if (root / path).exists()]
    paths = [path for path in tracked if not path.startswith("tests/")]
    complaints = [*crowded_folders(paths), *long_files(root, paths)]
    sys.exit("\n".join(complaints) or None)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
