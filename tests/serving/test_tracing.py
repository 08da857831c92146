"""Tracing where it is off must cost nothing; where it is on, see tests/e2e/test_traces.py."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from serving import tracing
from serving.settings import ServerSettings


def test_opentelemetry_is_not_imported_unless_it_is_on() -> None:
    program = "import sys, gateway.server; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_nothing_is_traced_unless_it_is_on() -> None:
    async with tracing.exporting(ServerSettings(), "service"):
        with tracing.call("/service/Method", [("traceparent", "00-" + "1" * 32)]):
            assert tracing.traceparent() == ""
            assert tracing.metadata() == ()
            assert tracing.start("sequence", "00-" + "1" * 32, {}) is None


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "http://", "http://host:4317/v1/traces"])
def test_endpoint_of_another_form_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="otlp_endpoint"):
        ServerSettings(otlp_endpoint=endpoint)
