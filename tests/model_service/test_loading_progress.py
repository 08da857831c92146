"""Loading is reported by log lines where there is no terminal."""

import io
import logging
import re
import sys

import pytest
import torch

from model_service.loading import progress

WEIGHTS = [(f"weight {number}", torch.zeros(10)) for number in range(200)]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())


def logged(caplog: pytest.LogCaptureFixture) -> list[int]:
    with caplog.at_level(logging.INFO):
        assert [*progress.reported(iter(WEIGHTS), 2000)] == WEIGHTS
    found = [re.fullmatch(r"loading weights: (\d+) %", each) for each in caplog.messages]
    return [int(match[1]) for match in found if match]


def test_long_loading_has_a_line_for_each_step(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert logged(caplog) == [*range(5, 101, 5)]


def test_short_loading_has_none(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 3600.0)
    assert logged(caplog) == []
