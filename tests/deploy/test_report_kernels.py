"""The line of `make env` about the CPU's kernels."""

import pytest

from deploy import report_kernels


@pytest.mark.parametrize(("reason", "lines"), [("", 0), ("they were not compiled", 1)])
def test_lacking_kernels_are_told_in_one_line(
    reason: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report_kernels, "without_kernels", lambda: reason)
    report_kernels.main()
    told = capsys.readouterr().out
    assert told.count("\n") == lines
    assert reason in told
