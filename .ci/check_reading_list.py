"""Measures how much code one reads to follow a streamed request from the client's call and back.

Run by `make lint`. The reading list is every `path/file.py:function` in the numbered steps of
docs/architecture.md. Prints each file with its length, and fails if the list is too long or names a
file or a function that does not exist.
"""

import ast
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/architecture.md"
STEPS = 10
MAX_FILES = 24
MAX_LINES = 4_000
REFERENCE = re.compile(r"([\w./-]+\.py)(?::([\w.]+))?")


def references(page: str) -> list[list[tuple[str, str]]]:
    """The files and functions that each numbered step of a page names."""
    steps: list[list[tuple[str, str]]] = []
    in_numbered = 0
    for token in MarkdownIt("commonmark").parse(page):
        in_numbered += {"ordered_list_open": 1, "ordered_list_close": -1}.get(token.type, 0)
        if in_numbered and token.type == "list_item_open":
            steps.append([])
        if in_numbered and token.type == "inline":
            codes = (child.content for child in token.children or [] if child.type == "code_inline")
            found = filter(None, map(REFERENCE.fullmatch, codes))
            steps[-1].extend((match[1], match[2] or "") for match in found)
    return steps


def defined_names(source: str) -> set[str]:
    """The functions and classes of a module: `function`, `Class`, `method` and `Class.method`."""
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, definitions):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{each.name}" for each in node.body if isinstance(each, definitions)
            }
    return names


def main(root: Path = ROOT) -> None:
    steps = references((root / PAGE).read_text("utf-8"))
    named = [reference for step in steps for reference in step]
    complaints = []
    if len(steps) != STEPS or not all(steps):
        complaints.append(f"{PAGE}: {STEPS} numbered steps must each name `path/file.py:function`")
    lines = {}
    for path, function in named:
        if not (root / path).is_file():
            complaints.append(f"{PAGE} names {path}, which does not exist")
            continue
        source = (root / path).read_text("utf-8")
        lines[path] = len(source.splitlines())
        if function and function not in defined_names(source):
            complaints.append(f"{PAGE} names {path}:{function}, which {path} does not define")
    for path, count in lines.items():
        print(f"{count:6,} {path}")
    total = sum(lines.values())
    print(f"{total:6,} lines in {len(lines)} files")
    if len(lines) > MAX_FILES or total > MAX_LINES:
        complaints.append(f"at most {MAX_LINES:,} lines in {MAX_FILES} files")
    sys.exit("\n".join(complaints) or None)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
