"""Logs as an operator reads them on stderr."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from serving.telemetry import logs

Configure = Callable[..., io.StringIO]
Logged = Callable[[], list[dict[str, Any]]]

# Ends with 0 if gRPC, when it is first imported, is told to write errors alone.
IMPORTS = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "grpc":
            os._exit(os.environ.get("GRPC_VERBOSITY") != "ERROR")
sys.meta_path.insert(0, Finder())
import {service}.__main__
"""


def test_event_is_one_json_object_a_line(logged: Logged) -> None:
    structlog.stdlib.get_logger("a.module").info("loaded", pieces=560, name="two\nlines")
    (line,) = logged()
    assert (line["event"], line["pieces"], line["name"]) == ("loaded", 560, "two\nlines")
    assert (line["level"], line["logger"]) == ("info", "a.module")
    assert line["timestamp"].endswith("Z")


def test_libraries_log_in_the_same_format(logged: Logged) -> None:
    with structlog.contextvars.bound_contextvars(request_id="abc"):
        logging.getLogger("a.library").warning("%d retries", 3)
    (line,) = logged()
    assert (line["event"], line["level"]) == ("3 retries", "warning")
    assert line["request_id"] == "abc"


def test_levels_below_the_setting_are_dropped(configure_logs: Configure) -> None:
    stderr = configure_logs(log_level="warning", log_format="json")
    structlog.stdlib.get_logger("a.module").info("too quiet")
    logging.getLogger("a.library").info("too quiet")
    structlog.stdlib.get_logger("a.module").warning("loud")
    assert [json.loads(line)["event"] for line in stderr.getvalue().splitlines()] == ["loud"]


def test_client_that_left_is_no_error(logged: Logged) -> None:
    core = logging.getLogger("grpc._cython.cygrpc")
    core.error("ExecuteBatchError raised in core by servicer method [/a.Service/Method]")
    core.error("anything else")
    assert [line["event"] for line in logged()] == ["anything else"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_traceback_shows_no_local_variables(configure_logs: Configure, log_format: str) -> None:
    stderr = configure_logs(log_format=log_format)
    said = "private".upper()
    try:
        raise RuntimeError(f"{len(said)} characters")
    except RuntimeError:
        structlog.stdlib.get_logger("a.module").exception("call failed")
    assert "RuntimeError: 7 characters" in stderr.getvalue()
    assert "PRIVATE" not in stderr.getvalue()


def test_exit_with_error_is_one_line_and_status_1(logged: Logged) -> None:
    with pytest.raises(SystemExit) as stop:
        logs.exit_with_error("no such file")
    assert stop.value.code == 1
    assert [(line["event"], line["level"]) for line in logged()] == [("no such file", "critical")]


@pytest.mark.parametrize(
    "service", ["gateway", "tokenizer_service", "model_service", "safety_service"]
)
def test_service_quiets_grpc_before_it_is_imported(service: str) -> None:
    program = IMPORTS.format(service=service)
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", program], check=False, env=environment)
    assert done.returncode == 0
