"""The part of a chat template that writes dialogs without tools.

It works on the statements and outputs of a template in canonical form, one string each. Branches
for tools and checks that refuse a dialog are left out: a dialog here has no tools, and the dialog
rules already refuse what a check would.
"""

import ast
import re
from collections.abc import Iterator, Sequence

# Conditions whose value is known for a dialog without tools, and where there is no clock.
_KNOWN = (
    (re.compile(r"\b(?:custom_|builtin_)?tools is defined"), False),
    (re.compile(r"\btools is not none(?: and\(message==user_messages\[-1\]\))?"), False),
    (re.compile(r"\btools is none"), True),
    (re.compile(r"\b(?:tools_in_user_message|date_string|strftime_now) is defined"), False),
    (re.compile(r"\btools_in_user_message\b"), True),
    (re.compile(r"'tool_calls'in message"), False),
    (re.compile(r"\bmessage\.tool_calls is (?:defined|not none)"), False),
    (re.compile(r"\bmessage\['role'\]=='(?:tool|tool_results|ipython)'"), False),
)
# Variables of the branches that are left out.
_UNUSED = re.compile(r"\{%set (?:tools|tools_in_user_message|user_messages|ns|ns\.index)=")
_HEAD = re.compile(r"\{%(if|elif|else|endif)\b(.*)%\}", re.DOTALL)


def without_tools(nodes: Sequence[str]) -> list[str]:
    """The statements and outputs that remain."""
    kept, _ = _branch(iter(nodes))
    found: list[str] = []
    for node in kept:
        if node == "{%endfor%}" and found and found[-1].startswith("{%for "):
            found.pop()
        else:
            found.append(node)
    return found


def _branch(nodes: Iterator[str]) -> tuple[list[str], str]:
    """The nodes up to the end of a branch, and the statement that ends it."""
    kept: list[str] = []
    for node in nodes:
        head = _HEAD.fullmatch(node)
        if head is None:
            if not _UNUSED.match(node):
                kept.append(node)
        elif head[1] == "if":
            kept += _choice(node, nodes)
        else:
            return kept, node
    return kept, ""


def _choice(head: str, nodes: Iterator[str]) -> list[str]:
    """The branches of an if statement that a dialog can take."""
    kept: list[str] = []
    while head not in {"", "{%endif%}"}:
        body, next_head = _branch(nodes)
        value = _value(head)
        if value is None and not _refuses(body):
            condition = head.removeprefix("{%el").removeprefix("{%")
            kept += [f"{{%{'el' if kept else ''}{condition}", *body]
        elif value and not _refuses(body):
            while next_head not in {"", "{%endif%}"}:
                _, next_head = _branch(nodes)
            return [*kept, "{%else%}", *body, "{%endif%}"] if kept else body
        head = next_head
    return [*kept, "{%endif%}"] if kept else []


def _refuses(body: list[str]) -> bool:
    return len(body) == 1 and body[0].startswith("{{raise_exception(")


def _value(head: str) -> bool | None:
    """The value of the condition of a branch; None if it depends on the dialog."""
    match = _HEAD.fullmatch(head)
    condition = match[2] if match else ""
    if head == "{%else%}":
        return True
    for known, value in _KNOWN:
        condition = known.sub(f" {value} ", condition)
    if re.fullmatch(r"(?:\s|\(|\)|\b(?:True|False|and|or|not)\b)+", condition) is None:
        return None
    try:
        return _evaluated(ast.parse(condition.strip(), mode="eval").body)
    except SyntaxError:
        return None


def _evaluated(node: ast.expr) -> bool | None:
    match node:
        case ast.Constant(value=bool(value)):
            return value
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluated(operand)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(map(_evaluated, values))
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(map(_evaluated, values))
    return None
