"""The folder that a converted checkpoint is written to."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from serving.errors import StartError


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
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
            yield
            cleanup.pop_all()
    except OSError as error:
        raise StartError(f"{folder} cannot be written: {error.strerror or error}") from error


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
