"""The canonical form of a chat template, for comparison.

A chat template is a program in Jinja's language, and the same program is published with other
quotes, spaces, line breaks and comments. In the canonical form these are equal. The program is
never run.

White space around blocks follows Jinja's `trim_blocks` and `lstrip_blocks`, with which Hugging
Face's transformers renders templates.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llama.prompt_format.template_branches import without_tools

_OPENING = re.compile(r"\{([%{#])([-+]?)")
_COMMENT_END = re.compile(r"([-+]?)#\}")
_TOKEN = re.compile(
    r"""(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<end>([-+]?)[%}]\})|(?P<space>\s+)"""
    r"""|(?P<word>\w+)|(?P<sign>.)""",
    re.DOTALL,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
# Other ways to write the same.
_SPELLINGS = (
    (re.compile(r"\.(content|role)\b"), r"['\1']"),
    (re.compile(r"\.strip\(\)"), "|trim"),
    (re.compile(r"\bloop\.index0==0"), "loop.first"),
    (re.compile(r"\(message\['content'\]\|trim\)"), "message['content']|trim"),
)


@dataclass(frozen=True, slots=True)
class _Part:
    """A statement, an output or a comment of a template, or the text between two of those."""

    kind: str  # "%", "{", "#", or "" for text
    content: str
    trims_before: bool = False
    trims_after: bool = False


def canonical(template: str) -> str:
    """The template with one spelling for all that has no effect.

    Statements are `{%…%}` and outputs `{{…}}`, without white space except between words; literal
    text is an output of a literal in single quotes; adjacent outputs and literals are joined.
    Branches for tools are left out.
    """
    parts = [*_parts(template.removesuffix("\n"))]
    written = []
    for index, part in enumerate(parts):
        if part.kind == "%":
            written.append(f"{{%{part.content}%}}")
        elif part.kind == "{":
            written.append(f"{{{{{part.content}}}}}")
        elif not part.kind:
            before = parts[index - 1] if index else _Part("", "")
            after = parts[index + 1] if index + 1 < len(parts) else _Part("", "")
            if text := _shown(part.content, before, after):
                written.append(f"{{{{{_literal(text)}}}}}")
    nodes = [*map(_usual, written)]
    text = "".join(without_tools(nodes)).replace("}}{{", "+")
    return text.replace("'+'", "")


def _usual(node: str) -> str:
    for spelling, usual in _SPELLINGS:
        node = spelling.sub(usual, node)
    return node


def _parts(template: str) -> Iterator[_Part]:
    position = 0
    while opening := _OPENING.search(template, position):
        yield _Part("", template[position : opening.start()])
        kind, mark = opening.groups()
        if kind == "#":
            end = _COMMENT_END.search(template, opening.end())
            content, position = "", len(template) if end is None else end.end()
            trims_after = end is not None and end[1] == "-"
        else:
            content, position, trims_after = _code(template, opening.end())
        yield _Part(kind, content, mark == "-", trims_after)
    yield _Part("", template[position:])


def _code(template: str, position: int) -> tuple[str, int, bool]:
    """The code of a block, the position behind it, and whether it trims the text there."""
    code, spaced = "", False
    for token in _TOKEN.finditer(template, position):
        if token["end"]:
            return code, token.end(), token["end"][0] == "-"
        if token["space"]:
            spaced = True
            continue
        text = _literal(unescaped(token["string"][1:-1])) if token["string"] else token[0]
        if spaced and token["word"] and re.fullmatch(r"\w", code[-1:]):
            code += " "
        code, spaced = code + text, False
    return code, len(template), False


def _shown(text: str, before: _Part, after: _Part) -> str:
    """The text between two parts as it is put out."""
    starts_line = not before.kind
    if before.trims_after:
        text = text.lstrip()
    elif before.kind in {"%", "#"} and text.startswith("\n"):
        text, starts_line = text[1:], True
    if after.trims_before:
        return text.rstrip()
    if after.kind in {"%", "#"}:
        line = text.rfind("\n") + 1
        if (line or starts_line) and not text[line:].strip():
            return text[:line]
    return text


def unescaped(literal: str) -> str:
    """The text of a literal, given without its quotes."""
    return re.sub(
        r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), literal, flags=re.DOTALL
    )


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
