"""Pages that repeat what the sources say: the Python reference, settings, and error messages."""

import ast
import re
from functools import cache

import pytest

from gateway.settings import GatewaySettings
from model_service.settings import ModelSettings
from safety_service.settings import SafetySettings
from serving.settings import ServerSettings
from tests.docs import reference
from tests.docs.markdown import ROOT
from tokenizer_service.settings import TokenizerSettings

SETTINGS: dict[str, type[ServerSettings]] = {
    "Every service": ServerSettings,
    "The gateway": GatewaySettings,
    "The tokenizer service": TokenizerSettings,
    "The model service": ModelSettings,
    "The safety service": SafetySettings,
}
SOURCES = ("chasqui", "client", "gateway", "llama", "model_service", "serving", "tokenizer_service")
CODE = re.compile(r"`([^`]+)`")
# Parts of messages that the operating system adds.
FROM_THE_SYSTEM = "Address already in use"


def test_python_reference_is_that_of_the_sources() -> None:
    assert reference.PAGE.read_text("utf-8") == reference.render(), (
        "the client has changed: run python -m tests.docs.reference"
    )


@pytest.mark.parametrize("section", SETTINGS)
def test_page_of_settings_has_every_flag_of_a_service(section: str) -> None:
    page = (ROOT / "docs" / "operations" / "settings.md").read_text("utf-8")
    [rows] = [part for part in page.split("\n## ") if part.startswith(f"{section}\n")]
    flags = {
        flag.removeprefix("--")
        for row in rows.splitlines()
        if row.startswith("| `--")
        for flag in CODE.findall(row.split("|")[1])
    }
    assert flags == own_fields(SETTINGS[section])


def test_troubleshooting_page_quotes_messages_that_there_are() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = [part for row in messages(page) for part in CODE.findall(row)]
    assert len(quoted) > 20
    assert not [text for text in quoted if not is_said(text)]


def own_fields(settings: type[ServerSettings]) -> set[str]:
    """The fields that a service has beside those that every service has."""
    shared = set() if settings is ServerSettings else ServerSettings.model_fields.keys() - {"port"}
    fields = settings.model_fields.keys() - shared
    return set(fields) - (set() if settings is ServerSettings else {"port"})


def messages(page: str) -> list[str]:
    """The first cells of the tables that list messages."""
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [row.split("|")[1] for table in tables for row in table.splitlines()]


def is_said(quoted: str) -> bool:
    """Whether the parts between the ellipses are in the sources' strings, or the system's."""
    parts = (part.strip().removesuffix(FROM_THE_SYSTEM) for part in quoted.split("…"))
    return all(part in strings() for part in parts)


@cache
def strings() -> str:
    """All texts of the sources, those of f-strings without their values."""
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    values = (node.value for node in nodes if isinstance(node, ast.Constant))
    return "\n".join(value for value in values if isinstance(value, str))
