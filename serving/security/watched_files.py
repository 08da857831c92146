"""Detects changes of files by their contents.

Time stamps are not enough: an editor, `cp -p` or rsync can change a file and keep its old time. The
files are small: a check takes some 20 µs a file.
"""

from collections.abc import Iterable
from pathlib import Path


class WatchedFiles:
    """Not thread-safe."""

    def __init__(self, paths: Iterable[Path | None]) -> None:
        self._paths = [path for path in paths if path is not None]
        self._seen = self._contents()

    def changed(self) -> bool:
        """Whether any content has changed since the last check, or since the start."""
        contents = self._contents()
        if contents == self._seen:
            return False
        self._seen = contents
        return True

    def _contents(self) -> list[bytes | None]:
        return [_content(path) for path in self._paths]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
