"""The folder of a conversion that may be interrupted: finished files are kept and recognised.

A file is written in a folder beside its place, moved there, and then entered into the list of
checksums. So an entry of the list whose checksum is right stands for a finished file.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model_service.offline.checksums import file_digest, read_list, write_list
from serving.errors import StartError

_STATE = ".conversion.json"
_PARTIAL = ".partial"


class UnfinishedFolder:
    """The target of a conversion.

    Args:
        folder: new, empty, or left by an interruption of the same conversion.
        request: what is converted and how, as JSON can hold it.
        list_name: the file for the checksums.
        algorithm: of the checksums, md5 or sha256.

    Raises:
        StartError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self, folder: Path, request: Mapping[str, Any], list_name: str, algorithm: str
    ) -> None:
        self._folder = folder
        self._request = json.dumps(request, sort_keys=True)
        self._list = folder / list_name
        self._algorithm = algorithm
        self._digests: dict[str, str] = {}
        try:
            self._open()
        except OSError as error:
            raise StartError(f"{folder} cannot be written: {error.strerror}") from error

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        state = self._folder / _STATE
        if not state.exists():
            new = self._folder / f"{_STATE}.new"
            new.unlink(missing_ok=True)  # left by an interruption at this point
            if any(self._folder.iterdir()):
                raise StartError(f"{self._folder} is not an empty folder: name a new one")
            new.write_text(self._request, "utf-8")
            new.replace(state)
        elif state.read_text("utf-8") != self._request:
            raise StartError(
                f"{self._folder} holds an unfinished conversion of another model, or with other "
                "flags: repeat that command, or name a new folder"
            )
        elif self._list.exists():
            self._digests = read_list(self._list)

    def is_finished(self, name: str) -> bool:
        """Whether the file is there and has the checksum with which it was finished."""
        path = self._folder / name
        if name not in self._digests or not path.is_file():
            return False
        return file_digest(path, self._algorithm, lambda _read: None) == self._digests[name]

    @property
    def staging(self) -> Path:
        """A folder for what is being written."""
        return self._folder / _PARTIAL

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Has `write` make the file at the path that it is given, and finishes it.

        Raises:
            StartError: the disk does not take it.
        """
        part = self.staging / name
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            # safetensors makes files that only their owner may read.
            part.chmod((self._folder / _STATE).stat().st_mode & 0o777)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            digest = file_digest(part, self._algorithm, lambda _read: None)
            part.replace(self._folder / name)
            self._digests[name] = digest
            write_list(self._list, self._digests)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises the second
            reason = getattr(error, "strerror", None) or error
            raise StartError(
                f"{self._folder / name} cannot be written: {reason}. To fix: make "
                "room or change the permissions, then start the same command again; it keeps the "
                "files that are finished"
            ) from error

    def check_room(self, needed: int) -> None:
        """Raises StartError unless the disk has room for `needed` bytes."""
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise StartError(
                f"{self._folder} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
                "there: make room, or name a folder on another disk"
            )

    def finish(self) -> None:
        """Removes what only an unfinished conversion needs."""
        shutil.rmtree(self.staging, ignore_errors=True)
        (self._folder / _STATE).unlink()
