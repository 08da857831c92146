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
