"""A bound on the bytes of large requests that a server holds at once, shared by callers."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.errors import resource_exhausted

# Of all callers together, as serialized.
MAX_BYTES = 64 * 1024 * 1024

Take = Callable[[int], None]


class ReceiveBudget:
    """Bytes by caller. Lives on the event loop.

    A caller may hold the bound divided by the number of callers that hold anything, itself
    included, so none can keep another out. One request may always be held, however large it is.
    """

    def __init__(self) -> None:
        self._by_caller: Counter[str] = Counter()

    @contextmanager
    def holding(self, caller: str) -> Iterator[Take]:
        """A function that takes a number of bytes for the caller, until the block ends.

        Raises:
            RequestError: RESOURCE_EXHAUSTED, by that function, beyond the caller's share.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            held = self._by_caller[caller]
            share = MAX_BYTES // len(self._by_caller.keys() | {caller})
            if held and held + size > share:
                message = (
                    f"requests of this caller that are being answered have {held} bytes, this one "
                    f"has {size}, and together they may have {share}"
                )
                raise resource_exhausted(message, "bytes of requests")
            self._by_caller[caller] += size
            taken += size

        try:
            yield take
        finally:
            self._by_caller[caller] -= taken
            if not self._by_caller[caller]:
                del self._by_caller[caller]
