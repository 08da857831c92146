"""The bound on what runs or waits at this gateway. Beyond it a request is turned away at once,
before its text is encoded: a caller that knows can go elsewhere, one in an endless queue only times
out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from serving.errors import resource_exhausted


class Admission:
    """Counts the sequences of all requests, from their acceptance to their end."""

    def __init__(self, max_sequences: int) -> None:
        self._max_sequences = max_sequences
        self._sequences = 0

    @property
    def sequences(self) -> int:
        """Those that run or wait now."""
        return self._sequences

    @contextmanager
    def admit(self, sequences: int) -> Iterator[None]:
        """Holds room for `sequences` while the context lasts; RESOURCE_EXHAUSTED without room."""
        if self._sequences + sequences > self._max_sequences:
            raise resource_exhausted(
                f"the queue is full: {self._sequences} of {self._max_sequences} sequences run or "
                f"wait, and the request has {sequences}",
                "max_queued_sequences",
            )
        self._sequences += sequences
        try:
            yield
        finally:
            self._sequences -= sequences
