"""Settings of all tests."""

import importlib.util
import os
import signal
from pathlib import Path

import hypothesis
import pytest

# Fixtures that the tests of the client and of the `chasqui` command share.
pytest_plugins = ("tests.command",)

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# The servers that tests start take their settings from the test and from nowhere else.
for name in [name for name in os.environ if name.startswith("CHASQUI_")]:
    del os.environ[name]

# The servers under test are on this machine, and gRPC would ask these for it, too.
for name in ("grpc_proxy", "http_proxy", "https_proxy"):
    os.environ.pop(name, None)

# Where no GPU is, Triton's interpreter runs the kernels, if Triton is there at all: told before
# anything imports it.
if importlib.util.find_spec("triton") and not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that runs the tests in the background has interrupts ignored, and what is ignored stays so
# in every child: no command under test would hear of Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests that take minutes first, so that no worker waits for one alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which kernels' paths the run covered, and what its measurements gave."""
    covered: set[str] = set()
    left = {"CUDA"}
    for outcome, found in (("passed", covered), ("skipped", left)):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", ()))
            if path := properties.get("cpu_path"):
                found.add(path)
            elif "model_service/cuda/" in report.nodeid and "CUDA_TESTS_DEVICE" not in os.environ:
                found.add("CUDA")
            if measured := properties.get("measured"):
                terminalreporter.write_line(measured)
    if covered:
        names = (", ".join(sorted(each)) or "none" for each in (covered, left - covered))
        terminalreporter.write_line("kernels covered: {}; not covered here: {}".format(*names))
