"""Links between pages lead somewhere."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.docs.markdown import ROOT, markdown_files


def test_links_lead_to_files_and_headings_that_are_there() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in markdown_files(ROOT)
        for link in links(page)
        if not leads_somewhere(page, link)
    ]
    assert not broken


def links(page: Path) -> Iterator[str]:
    """The links of a page into the repository."""
    for token in _tokens(page):
        for child in token.children or ():
            target = child.attrs.get("href")
            if isinstance(target, str) and "://" not in target:
                yield target


def leads_somewhere(page: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    path = page.parent / name if name else page
    return path.exists() and (not heading or heading in anchors(path))


@cache
def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub names them in links."""
    tokens = _tokens(page)
    titles = [text.content for opening, text in pairwise(tokens) if opening.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
