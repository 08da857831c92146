"""The error of a bad checkpoint; its message names the file and the fix."""

from pathlib import Path

from serving.errors import StartError

# Remedies of several errors.
FETCH_AGAIN = "copy or download it again"
READABLE = "make it a file that this user may read"


class CheckpointError(StartError):
    """A checkpoint file is missing, damaged, dangerous, or does not fit the others."""

    def __init__(self, path: Path, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}. To fix: {fix}.")
        self.path = path
        self.problem = problem
        self.fix = fix


def shown_shape(shape: tuple[int, ...]) -> str:
    """A shape in a message; a negative size may be any."""
    return " × ".join("any" if size < 0 else str(size) for size in shape) or "a single number"


def shown_names(names: list[str]) -> str:
    """The first of some names in a message, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
