"""The recorder of CUDA graphs, with a journal in the place of CUDA: what is captured, and when."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from model_service.model.graphs.recorder import GraphRecorder


class Device:
    """Stands in for `torch.cuda`: work is run, or captured by the one graph that is open."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self._open: Graph | None = None
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", self._on_stream)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(torch.cuda, "graph", self._capture)

    def work(self, name: str) -> None:
        (self._open.work if self._open else self.done).append(name)

    @contextmanager
    def _on_stream(self, stream: object) -> Iterator[None]:
        yield

    @contextmanager
    def _capture(self, graph: Any, **settings: Any) -> Iterator[None]:
        assert self._open is None
        assert settings["pool"] == "pool"
        self._open = graph
        try:
            yield
        finally:
            self._open = None


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


class Graph:
    def __init__(self, device: Device) -> None:
        self.work: list[str] = []
        self._device = device

    def replay(self) -> None:
        self._device.done.append("+".join(self.work))

    def reset(self) -> None:
        self.work = []


def test_a_run_is_captured_in_pieces_and_calls_between_them_are_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    record, step = GraphRecorder(), 0

    def run() -> None:
        for name in ("a", "b"):
            device.work(f"{name}1")
            device.work(f"{name}2")
            record.between(lambda name=name: device.work(f"{name} of step {step}"))  # type: ignore[misc]
        device.work("end")

    repeat = record(run)
    first = ["a1", "a2", "a of step 0", "b1", "b2", "b of step 0", "end"]
    assert device.done == first  # nothing is done while it is captured
    for step in (1, 2):
        device.done.clear()
        repeat()
        assert device.done == ["a1+a2", f"a of step {step}", "b1+b2", f"b of step {step}", "end"]
    device.done.clear()
    whole = record(lambda: device.work("decode"))
    whole()
    assert device.done == ["decode", "decode"]


def test_a_run_that_fails_leaves_no_capture_open(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    record, runs = GraphRecorder(), 0

    def run() -> None:
        nonlocal runs
        runs += 1
        record.between(lambda: device.work("between"))
        if runs == 2:
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        record(run)
    device.done.clear()
    record(lambda: device.work("later"))()
    assert device.done == ["later", "later"]
