"""The metrics in the dashboard and the alerts exist, and each alert is explained."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama.v1.chat_pb2 import TextCompleteRequest

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
ADDED_BY_PROMETHEUS = {"job", "instance"}
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
    "gauge": ("",),
    "unknown": ("",),
}


def dashboard_expressions(path: Path) -> Iterator[str]:
    for panel in json.loads(path.read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    shown = [each for path in DASHBOARDS for each in dashboard_expressions(path)]
    return [*shown, *(rule["expr"] for rule in alert_rules())]


def metrics_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names: what is no label, function or keyword."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", expression)
    names = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\s*\(|\w)", bare)
    return {*names} - {"and", "or", "unless", "bool", "offset"}


def labels_in(expression: str) -> set[str]:
    """The labels that it selects or groups by."""
    selected = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression)
    grouped = re.findall(r"\bby\s*\(([^)]*)\)", expression)
    return {*selected, *(name.strip() for names in grouped for name in names.split(","))}


@pytest.fixture
async def families(chat: Any, stack: Any) -> dict[str, set[str]]:
    """The metrics of all services after a call, by the names of samples, with their labels."""
    await chat.TextComplete(TextCompleteRequest(prompts=["a"]))
    found: dict[str, set[str]] = {"up": set()}
    for service in (stack.gateway, stack.tokenizer, stack.model):
        for family in service.scrape().families:
            for suffix in SUFFIXES[family.type]:
                labels = found.setdefault(family.name + suffix, set())
                labels.update(*(sample.labels for sample in family.samples))
    return found


async def test_every_query_names_metrics_that_exist(families: dict[str, set[str]]) -> None:
    assert len(expressions()) > 30
    for expression in expressions():
        assert metrics_in(expression), expression
        assert metrics_in(expression) <= families.keys(), expression


async def test_every_query_uses_labels_that_its_metrics_have(
    families: dict[str, set[str]],
) -> None:
    # A metric without a sample yet shows no labels; those of refusals are the calls' and a reason.
    families["chasqui_refusals_total"] = families["grpc_server_handled_total"] | {"reason"}
    for expression in expressions():
        known = set().union(*(families[name] for name in metrics_in(expression)))
        assert labels_in(expression) <= known | ADDED_BY_PROMETHEUS, expression


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_alert_has_its_section_in_the_runbook(rule: dict[str, Any]) -> None:
    runbook = (ROOT / "docs/operations/alerts.md").read_text()
    assert f"\n### {rule['alert']}\n" in runbook
    assert rule["annotations"]["runbook"] == f"docs/operations/alerts.md#{rule['alert'].lower()}"
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_names_are_found_in_an_expression() -> None:
    expression = (
        'histogram_quantile(0.95, sum by (le, job) (rate(a_bucket{x="b",y!~"c"}[5m]))) > 0.5 '
        "and sum(increase(d_total[$__rate_interval])) / e:f == 1e3"
    )
    assert metrics_in(expression) == {"a_bucket", "d_total", "e:f"}
    assert labels_in(expression) == {"le", "job", "x", "y"}
