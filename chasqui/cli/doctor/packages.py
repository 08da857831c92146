"""Checks Python's version and the packages of each extra of the distribution.

Nothing is imported: versions come from the metadata of what is installed.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from chasqui.cli.doctor.finding import Finding, fine, remark, wrong

DISTRIBUTION = "chasqui-llama"
# The extras that `chasqui serve` needs, and those that it does without.
NEEDED = ("serving", "tokenizer", "model")
OPTIONAL = ("cuda",)


def check_python() -> Finding:
    """Python's version, against the one that the distribution asks for."""
    version = platform.python_version()
    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return fine("Python", f"{version}, {sys.executable}")
    return wrong(
        "Python",
        f"{version}, and Chasqui needs {wanted}",
        "make the environment with a newer Python: make env PYTHON=python3.11",
    )


def check_extras() -> Iterator[Finding]:
    """The packages of each extra: their versions, and which are missing or do not fit."""
    for extra in NEEDED:
        problem, text = _packages(extra)
        if problem:
            fix = f"pip install '.[{extra}]' in the source tree"
            yield wrong(f"[{extra}]", f"{text} (the client works without)", fix)
        else:
            yield fine(f"[{extra}]", text)
    for extra in OPTIONAL:
        problem, text = _packages(extra)
        if problem:
            yield remark(f"[{extra}]", f"{text} (faster kernels for GPUs; all works without)")
        else:
            yield fine(f"[{extra}]", text)


def _packages(extra: str) -> tuple[bool, str]:
    """Whether packages of an extra are missing or do not fit, and which; else all versions."""
    found, missing, unfit = [], [], []
    for requirement in requirements(extra):
        version = installed_version(requirement.name)
        if version is None:
            missing.append(requirement.name)
        elif requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
        else:
            unfit.append(f"{requirement.name} {version} is not {requirement.specifier}")
    problems = [f"not installed: {', '.join(missing)}"] * bool(missing) + unfit
    return bool(problems), "; ".join(problems) or ", ".join(found)


def requirements(extra: str) -> Iterator[Requirement]:
    """The packages that an extra adds, without the distribution itself."""
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or requirement.name == DISTRIBUTION:
            continue
        if marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement


def installed_version(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
