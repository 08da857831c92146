"""The protocol between comparison and workers: a JSON object per line over stdin and stdout.

Workers run in environments of their own, so this module needs the standard library alone.
"""

import json
import os
import sys
import traceback
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """The model that a worker loads, and the most that will be asked of it."""

    model: str  # path
    precision: str
    device: str
    threads: int
    sequences: int  # at once
    length: int  # tokens of one sequence
    tokens: int  # of all sequences at once
    options: dict[str, Any]


class Worker(Protocol):
    """An engine behind the protocol. Times cover the forward pass and greedy sampling."""

    def load(self, job: Job) -> dict[str, str]:
        """Loads the model. Returns versions and settings, for the result file."""

    def prefill(self, prompt: list[int]) -> list[float]:
        """Seconds from the prompt to its first token."""

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps in which all prompts, of one length, are continued."""

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The `count` most probable next tokens, one after the other."""


def serve(worker: Worker) -> None:
    """Answers requests until stdin ends.

    Answers leave by a copy of stdout; stdout itself becomes stderr, as libraries print to it.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if isinstance(sys.stdout, TextIOWrapper):  # a process that dies must not lose its last line
        sys.stdout.reconfigure(line_buffering=True)
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("op")
        try:
            arguments = {"job": Job(**request)} if operation == "load" else request
            answer = {"ok": getattr(worker, operation)(**arguments)}
        except Exception as error:  # the comparison reports it, whatever it is
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
