"""Checks the files of a model and whether it fits the memory, by `chasqui model inspect`."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chasqui.cli.doctor.finding import Finding, fine, wrong
from chasqui.cli.doctor.packages import installed_version
from chasqui.cli.doctor.probe import start_probe

GIB = 2**30


class ModelProbe:
    """The process that reads the headers of a model's files."""

    def __init__(self, path: Path, tokenizer_path: Path | None) -> None:
        self._path = path
        self._process: subprocess.Popen[str] | None = None
        if installed_version("psutil") is not None:
            named = ["--tokenizer_path", str(tokenizer_path)] if tokenizer_path else []
            self._process = start_probe("inspect", "--json", str(path), *named)

    def findings(self) -> Iterator[Finding]:
        """Waits for the answer."""
        if self._process is None:
            fix = "pip install '.[model]' in the source tree"
            yield wrong("model", f"{self._path} is not read: psutil is not installed", fix)
            return
        output, errors = self._process.communicate()
        try:
            found = json.loads(output)
        except ValueError:
            # The error names the file and has its own remedy.
            problem, _, fix = _last_line(errors).partition(". To fix: ")
            yield wrong("model", problem, fix or "see chasqui model inspect")
            return
        yield _weights(found)
        yield from _tokenizer(found)
        yield _memory(found)


def _weights(found: Mapping[str, Any]) -> Finding:
    size = sum(file["bytes"] for file in found["files"])
    parameters = f"{found['parameters']:,} parameters"
    files = f"{len(found['files'])} file{'s' * (len(found['files']) > 1)}, {_readable(size)}"
    return fine("model", f"{found['path']}: {found['format']}, {parameters}, {files}")


def _tokenizer(found: Mapping[str, Any]) -> Iterator[Finding]:
    tokenizer = found["tokenizer"]
    if tokenizer is not None and not found["problems"]:
        text = f"{tokenizer['path']}: {tokenizer['form']}, {tokenizer['tokens']:,} tokens"
        yield fine("tokenizer", f"{text}, prompt format {tokenizer['prompt_format']}")
    for problem in found["problems"]:
        text, _, fix = problem.partition(". To fix: ")
        yield wrong("tokenizer", text, fix or "name the tokenizer with --tokenizer_path")


def _memory(found: Mapping[str, Any]) -> Finding:
    """Whether any precision fits any device."""
    for device in found["memory"]:
        fitting = [need["precision"] for need in device["needs"] if need["fits"]]
        if fitting:
            free = _readable(device["free"])
            text = f"the model fits the {free} free on {device['name']}: {', '.join(fitting)}"
            return fine("memory", text)
    smallest = min(
        need["weights"] + need["cache"] + found["working_memory"]
        for device in found["memory"]
        for need in device["needs"]
    )
    free = max(device["free"] for device in found["memory"])
    return wrong(
        "memory",
        f"the model needs {_readable(smallest)} at least, and {_readable(free)} are free",
        "end other programs, take a smaller model, or spread it over machines "
        "(docs/operations/memory.md)",
    )


def _last_line(errors: str) -> str:
    return (errors.strip().splitlines() or ["it wrote nothing"])[-1].rstrip(".")


def _readable(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
