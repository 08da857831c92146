"""The folder that a converted checkpoint is written to."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.errors import StartError


class Target(Protocol):
    """A folder that takes the files of a checkpoint one after the other."""

    @property
    def staging(self) -> Path:
        """A folder on the same disk, for temporary files; it may not exist yet."""

    def is_finished(self, name: str) -> bool:
        """Whether the file is there already, from an earlier attempt."""

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Has `write` make the file at the path that it is given.

        Raises:
            OSError, StartError: it cannot be written.
        """


@dataclass(frozen=True, slots=True)
class _NewFolder:
    """A folder whose files are written from scratch."""

    folder: Path

    @property
    def staging(self) -> Path:
        return self.folder / ".partial"

    def is_finished(self, name: str) -> bool:
        return (self.folder / name).exists()

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        write(self.folder / name)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Target]:
    """Makes `folder`; empties it again if the block fails.

    Raises:
        StartError: it is in use, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StartError(f"{folder} is not an empty folder: name a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(_empty, folder)
            yield _NewFolder(folder)
            cleanup.pop_all()
    except OSError as error:
        raise StartError(f"{folder} cannot be written: {error.strerror or error}") from error


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
