"""A service's process: what it needs, what its start warns of, and what it collects."""

import gc
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from serving.process import configure, freeze_gc
from serving.settings import ServerSettings

# Runs a service as if a package were not installed.
WITHOUT = """
import runpy, sys
sys.modules[{package!r}] = None
runpy.run_module({service!r}, run_name="__main__")
"""


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_full_collections_walk_nothing_of_what_was_loaded() -> None:
    freeze_gc()
    assert len(gc.get_objects(generation=2)) < 1000 < gc.get_freeze_count()


@pytest.mark.parametrize(
    ("service", "package", "extra"),
    [
        ("gateway", "structlog", "gateway"),
        ("tokenizer_service", "sentencepiece", "tokenizer"),
        ("safety_service", "pydantic_settings", "safety"),
        ("model_service", "pydantic", "model"),
    ],
)
def test_missing_package_is_named_with_the_extra_that_installs_it(
    service: str, package: str, extra: str
) -> None:
    program = WITHOUT.format(service=service, package=package)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"the package {package} is not installed: pip install '.[{extra}]'")


@pytest.mark.usefixtures("configure_logs")
def test_misspelt_variable_is_warned_of_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHASQUI_GRACE_PERIODS", "5")
    monkeypatch.setenv("CHASQUI_OF_ANOTHER_SERVICE", "5")
    monkeypatch.setattr("sys.argv", ["demo", "--log_format=json"])
    assert configure(ServerSettings, "demo").grace_period == 30
    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["level"], line["event"]) == ("warning", "unknown variable, ignored")
    assert line["variable"] == "CHASQUI_GRACE_PERIODS"
    assert line["nearest"] == "CHASQUI_GRACE_PERIOD"
