"""The code blocks of the Markdown pages.

The first word after a block's fence is its language. Further words are marks for the tests, which a
rendered page does not show: `serves=50051`, `needs=docker`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
# Results of benchmarks are generated, and have no blocks.
WITHOUT_PAGES = {"build", "dist", "node_modules", "results"}


@dataclass(frozen=True, slots=True)
class Block:
    page: str  # its path in the repository
    line: int  # of the fence
    language: str
    marks: dict[str, str]  # without a value: empty
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path: Path, page: str) -> list[Block]:
    """The blocks of a page, in its order; indented ones have no language."""
    tokens = MarkdownIt("commonmark").parse(path.read_text("utf-8"))
    return [
        _block(page, (token.map or [0])[0] + 1, token.info, token.content)
        for token in tokens
        if token.type in {"fence", "code_block"}
    ]


def _block(page: str, line: int, info: str, text: str) -> Block:
    language, *marks = info.split() or [""]
    named = (mark.partition("=") for mark in marks)
    return Block(page, line, language, {name: value for name, _, value in named}, text)


def all_pages() -> dict[str, list[Block]]:
    """The repository's pages that have blocks, by their paths."""
    names = (str(path.relative_to(ROOT)) for path in markdown_files(ROOT))
    pages = {name: read_blocks(ROOT / name, name) for name in names}
    return {name: blocks for name, blocks in pages.items() if blocks}


def markdown_files(folder: Path) -> Iterator[Path]:
    """The pages below a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name.startswith(".") or path.name in WITHOUT_PAGES:
            continue
        if path.is_dir():
            yield from markdown_files(path)
        elif path.suffix == ".md":
            yield path
