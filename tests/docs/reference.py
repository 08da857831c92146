"""Writes docs/clients/reference.md: what `chasqui` exports, from the sources and their docstrings.

`python -m tests.docs.reference` rewrites the page after a change; a test compares the two. It reads
the sources and imports nothing, so types are shown as they are written there.
"""

import ast
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from tests.docs.markdown import ROOT

PACKAGE = "chasqui"
PAGE = ROOT / "docs" / "clients" / "reference.md"
HEAD = """# Python reference

Everything that `from chasqui import …` offers, generated from the docstrings by
`python -m tests.docs.reference`. [python.md](python.md) explains how to use it.
"""
SECTIONS = ("Clients", "Functions", "Types", "Errors")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Definition:
    name: str
    statement: ast.stmt
    source: str  # of its module

    @property
    def section(self) -> str:
        if self.name.endswith("Client"):
            return "Clients"
        if self.name.endswith("Error"):
            return "Errors"
        return "Functions" if isinstance(self.statement, Function) else "Types"

    def comment(self, statement: ast.stmt) -> str:
        """The comment behind a statement, as another sentence."""
        line = self.source.splitlines()[(statement.end_lineno or statement.lineno) - 1]
        _, found, comment = line.partition("  # ")
        return f": {comment}" if found and not comment.startswith("type:") else ""


def render() -> str:
    """The whole page."""
    found = [definition(PACKAGE, name) for name in exported()]
    parts = [HEAD]
    for section in SECTIONS:
        parts.append(f"## {section}\n")
        parts += [_described(each) for each in found if each.section == section]
    return "\n".join(parts)


def exported() -> list[str]:
    """The names that `chasqui` exports."""
    for statement in _tree(PACKAGE).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return sorted(name for name in ast.literal_eval(value) if name[0] != "_")
    raise ValueError(f"{PACKAGE} has no __all__")


def definition(module: str, name: str) -> Definition:
    """Where a name comes from, through any number of imports."""
    for statement in _tree(module).body:
        match statement:
            case ast.ImportFrom(module=str(origin), names=names):
                for alias in names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        return definition(origin, name if alias.name == "*" else alias.name)
            case ast.ClassDef() | ast.FunctionDef() if statement.name == name:
                return Definition(name, statement, _source(module))
            case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                return Definition(name, statement, _source(module))
            case ast.AnnAssign(target=ast.Name(id=target)) if target == name:
                return Definition(name, statement, _source(module))
    raise ValueError(f"{module} does not define {name}")


def _described(each: Definition) -> str:
    statement = each.statement
    if isinstance(statement, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, statement.bases))
        lines = [f"### {each.name}\n"]
        if bases:
            lines.append(f"A kind of `{bases}`.\n")
        if text := _docstring(statement):
            lines.append(f"{text}\n")
        members = [*_members(each, statement)]
        return "\n".join([*lines, *members, ""] if members else lines)
    if isinstance(statement, Function):
        return f"### {each.name}\n\n`{_signature(statement)}`\n\n{_docstring(statement)}\n"
    return f"### {each.name}\n\n`{ast.unparse(statement)}`\n"


def _members(each: Definition, statement: ast.ClassDef) -> Iterator[str]:
    for member in statement.body:
        match member:
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                yield f"- `{ast.unparse(member)}`{each.comment(member)}"
            case ast.Assign(targets=[ast.Name(id=name)]) if not name.startswith("_"):
                yield f"- `{name}`{each.comment(member)}"
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if member.name == "__init__":
                    yield f"- `{each.name}{_signature(member).removeprefix('__init__')}`"
                elif not member.name.startswith("_"):
                    text = _indented(_docstring(member))
                    yield f"- `{_signature(member)}`{text and f': {text}'}"


def _signature(function: Function) -> str:
    if _names(function.decorator_list) & {"property", "cached_property"}:
        return f"{function.name}: {ast.unparse(function.returns)}" if function.returns else ""
    arguments = function.args
    for listed in (arguments.posonlyargs, arguments.args):
        if listed and listed[0].arg == "self":
            del listed[0]
    start = "async " if isinstance(function, ast.AsyncFunctionDef) else ""
    result = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{start}{function.name}({ast.unparse(arguments)}){result.removesuffix(' -> None')}"


def _names(expressions: Iterable[ast.expr]) -> set[str]:
    return {ast.unparse(each).rpartition(".")[2] for each in expressions}


def _docstring(node: ast.ClassDef | Function) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def _indented(text: str) -> str:
    return text.replace("\n\n", "\n").replace("\n", "\n  ")


@cache
def _source(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text("utf-8")


def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
