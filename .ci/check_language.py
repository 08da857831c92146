"""Checks the words and sentences of sources and docs against the house's language.

Run by `make lint`, on the files that git tracks. There are two rules:

- A name that was replaced by a plainer one does not come back (RETIRED_NAMES).
- Docstrings, comments, `--help` texts and pages are plain English: no sentence begins with "Of",
  "What" or "Who", unless it is a question, and none holds a word of PERSONS.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
# Generated code and results, history, training text with a digest, and examples of what is refused.
EXEMPT = re.compile(r"llama/v1/|bench/results/|CHANGELOG\.md|demo/text/|tests/house/")

# Regular expressions for names, or `file:name`, beside what to say instead. The plain `peer` is a
# method of gRPC.
RETIRED_NAMES = {
    r"_peer|_?peers|[Pp]eer_.*|.*_peers?|Peer[A-Z]\w*": "upstream, client_address or baseline",
    r"_?take|_?note": "on_event, feed, append_chunk, record or observe",
    r"_?[Pp]ace|\w+Pace": "ThroughputEstimator or PrefillBudget",
    r"Placement": "routing",
    r"\w*[Uu]nread(?!able|_bytes)\w*": "send_buffer",
    r"_?held_answer|HeldAnswer": "moderation_buffer",
    r"gateway/.*:_?(coming|judged|due)": "in_progress, on_verdict or next_chunk",
    r"gateway/.*:class (Replica|Tokenizer)": "ReplicaClient or TokenizerClient",
    r"\w*[Ss]eldom\w*": "rate_limited_log",
    r"garbage": "freeze_gc",
    r"core_log": "GRPC_VERBOSITY",
    r"_?[Ff]light": "InFlightStep",
    r"model_service/.*:(_expect|_?coming|_?awaited)": "reserve_pending, in_progress or waits_for",
    r"model_service/.*:(_?retract|_?drawn|Row)": "invalidate, sampled or LogitRow",
    r"model_service/.*:(_?laden|_?bare)": "with_prefill or decode_only",
    r"model_service/.*:_?adjustments": "penalties",
    r"(MOST|LEAST)_\w*": "MAX_ or MIN_",
}

SENTENCE_START = re.compile(r"(?:^|[.!?:;]\s+|\n\s*\n)((?:Of|What|Who)\b[^.!?]*(?:[.!?]|$))")
PERSONS = re.compile(r"\b(nobody|anybody|somebody|whoever|strangers?)\b", re.IGNORECASE)

Text = tuple[int, str]  # the line where it begins, and its sentences


def python_names(source: str) -> Iterator[Text]:
    """The names in a module, attributes and arguments too; a class also as `class Name`."""
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string
            if before == "class":
                yield token.start[0], f"class {token.string}"
            before = token.string


def python_texts(source: str) -> Iterator[Text]:
    """The docstrings, comments and `--help` texts of a module."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
            case ast.keyword(arg="help" | "description" | "epilog", value=value):
                parts = [each for each in ast.walk(value) if isinstance(each, ast.Constant)]
                yield value.lineno, "".join(str(part.value) for part in parts)
    yield from comments(source, "#")


def comments(source: str, mark: str) -> Iterator[Text]:
    """The comments of a file. Those in consecutive lines are one text."""
    begin, text = 0, ""
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        found = re.match(rf"\s*{mark}+ ?(.*)", line)
        if found:
            begin, text = begin or number, f"{text}{found[1]}\n"
            continue
        if text:
            yield begin, text
        begin, text = 0, ""
        behind = re.search(rf"\s{mark}+ (.*)", line)
        if behind:
            yield number, behind[1]


def markdown_texts(source: str) -> Iterator[Text]:
    """The paragraphs and cells of a page, without headings, the heads of tables and code."""
    tokens = MarkdownIt("commonmark").enable("table").parse(source)
    line = 0
    for opening, token in pairwise(tokens):
        line = opening.map[0] + 1 if opening.map else line
        if token.type == "inline" and opening.type in {"paragraph_open", "td_open"}:
            yield line, "".join(map(_shown, token.children or []))


def _shown(token: Token) -> str:
    match token.type:
        case "code_inline":
            return "code"
        case "softbreak" | "hardbreak":
            return "\n"
    return token.content


def complaints(path: str, source: str) -> Iterator[str]:
    """The places of a file that break a rule."""
    if path.endswith(".py"):
        for line, name in python_names(source):
            if replacement := _replacement(path, name):
                yield f"{path}:{line}: the name {name} was retired; say {replacement}"
        texts = python_texts(source)
    elif path.endswith(".md"):
        texts = markdown_texts(source)
    else:
        texts = comments(source, "//" if path.endswith(".proto") else "#")
    for line, text in texts:
        for match in [*SENTENCE_START.finditer(text), *PERSONS.finditer(text)]:
            if not match[1].endswith("?"):
                place = line + text.count("\n", 0, match.start(1))
                yield f"{path}:{place}: not plain English: {' '.join(match[1].split())}"


@cache
def _replacement(path: str, name: str) -> str | None:
    """The words to say instead of a retired name."""
    for pattern, replacement in RETIRED_NAMES.items():
        if re.fullmatch(pattern, f"{path}:{name}" if ":" in pattern else name):
            return replacement
    return None


def main(root: Path = ROOT) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    )
    found: list[str] = []
    for path in listed.stdout.splitlines():
        kind = Path(path).suffix or Path(path).name
        checked = {".py", ".md", ".proto", ".toml", ".yml", ".yaml", "Makefile", "Dockerfile"}
        if kind in checked and not EXEMPT.match(path) and (root / path).is_file():
            found += complaints(path, (root / path).read_text("utf-8"))
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
