"""Files that are used again when they change.

Their contents are compared, not their time stamps: an editor, `cp -p` or rsync can put another
content under an old time. The files are small, and each look costs some 20 µs a file.
"""

from collections.abc import Iterable
from pathlib import Path


class WatchedFiles:
    """Not thread-safe."""

    def __init__(self, paths: Iterable[Path | None]) -> None:
        self._paths = [path for path in paths if path is not None]
        self._seen = self._contents()

    def changed(self) -> bool:
        """Whether a content differs from what it was at the last look, or at the start."""
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
