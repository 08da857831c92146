"""Tracing where it is off must cost nothing; where it is on, see tests/e2e/test_traces.py."""

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import ValidationError

from serving.settings import ServerSettings
from serving.telemetry import tracing
from serving.telemetry.otlp import sampler

# An id that TraceIdRatioBased samples at any ratio, and one that it samples at none below 1.
LOW, HIGH = "0" * 31 + "1", "f" * 32
CALLS = 2000
PARENT = f"00-{'1' * 32}-{'1' * 16}-01"


@pytest.mark.parametrize("package", ["opentelemetry.sdk", "opentelemetry.exporter"])
def test_sdk_and_exporter_are_not_imported_unless_tracing_is_on(package: str) -> None:
    program = f"import sys, gateway.server; sys.exit('{package}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_nothing_is_traced_unless_it_is_on() -> None:
    async with tracing.exporting(ServerSettings(), "service"):
        with tracing.call("/service/Method", [("traceparent", PARENT)]):
            assert tracing.traceparent() == ""
            assert tracing.metadata() == ()
            assert not tracing.start("sequence", PARENT, {}).is_recording()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "http://", "http://host:4317/v1/traces"])
def test_endpoint_of_another_form_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="otlp_endpoint"):
        ServerSettings(otlp_endpoint=endpoint)


def sampled(decider: Sampler, trace_id: str, flags: str) -> int:
    """How many of CALLS calls are sampled whose caller sends such a traceparent."""
    carrier = {tracing.TRACEPARENT: f"00-{trace_id}-{'1' * 16}-{flags}"}
    parent = TraceContextTextMapPropagator().extract(carrier)
    results = (decider.should_sample(parent, int(trace_id, 16), "Method") for _ in range(CALLS))
    return sum(each.decision is Decision.RECORD_AND_SAMPLE for each in results)


@pytest.mark.parametrize("trace_id", [LOW, HIGH])
def test_caller_cannot_have_more_sampled_than_the_ratio(
    trace_id: str,
) -> None:
    none, quarter, all_ = (sampler(ratio, trusts_callers=False) for ratio in (0.0, 0.25, 1.0))
    assert sampled(none, trace_id, "01") == 0
    # Ten standard deviations, so that chance does not fail the test.
    assert abs(sampled(quarter, trace_id, "01") - CALLS / 4) < 200
    assert sampled(all_, trace_id, "01") == CALLS


def test_caller_that_does_not_sample_is_not_sampled() -> None:
    assert sampled(sampler(1.0, trusts_callers=False), LOW, "00") == 0


def test_trusted_caller_decides() -> None:
    assert sampled(sampler(0.0, trusts_callers=True), HIGH, "01") == CALLS
    assert sampled(sampler(1.0, trusts_callers=True), HIGH, "00") == 0
