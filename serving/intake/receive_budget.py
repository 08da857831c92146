"""A limit on the bytes of the large requests that a server holds, shared fairly by callers."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.errors import resource_exhausted

# Serialized bytes of all callers together.
MAX_BYTES = 64 * 1024 * 1024

Reserve = Callable[[int], None]


class ReceiveBudget:
    """The reserved bytes of each caller. Not thread-safe: belongs to the event loop.

    A caller's share is MAX_BYTES divided by the number of callers with a reservation, itself
    included, so no caller can keep another out. A caller's only request always fits.
    """

    def __init__(self) -> None:
        self._by_caller: Counter[str] = Counter()

    @contextmanager
    def reservation(self, caller: str) -> Iterator[Reserve]:
        """A function that reserves bytes for the caller until the end of the block.

        Raises:
            RequestError: RESOURCE_EXHAUSTED, by that function, beyond the caller's share.
        """
        reserved = 0

        def reserve(size: int) -> None:
            nonlocal reserved
            held = self._by_caller[caller]
            share = MAX_BYTES // len(self._by_caller.keys() | {caller})
            if held and held + size > share:
                message = (
                    f"requests of this caller that are being answered have {held} bytes, this one "
                    f"has {size}, and together they may have {share}"
                )
                raise resource_exhausted(message, "bytes of requests")
            self._by_caller[caller] += size
            reserved += size

        try:
            yield reserve
        finally:
            self._by_caller[caller] -= reserved
            if not self._by_caller[caller]:
                del self._by_caller[caller]
