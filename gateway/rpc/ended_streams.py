"""Decides which ended named streams are kept, within a number of bytes that all callers share. Uses
only names and sizes, so that fairness can be tested as arithmetic.
"""

StreamKey = tuple[str, str]  # the name of the caller's key, and stream_name


class EndedStreams:
    """Sizes of ended streams, by caller.

    Above the bound, the caller that keeps the most bytes loses its oldest stream. So a caller loses
    nothing while it keeps no more than the bound divided by the number of callers with streams.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._total = 0
        self._sizes: dict[str, dict[StreamKey, int]] = {}  # by caller, each in the order of ends
        self._totals: dict[str, int] = {}  # by caller

    def add(self, key: StreamKey, size: int) -> list[StreamKey]:
        """Adds an ended stream; returns the streams to forget."""
        caller, _ = key
        self._sizes.setdefault(caller, {})[key] = size
        self._totals[caller] = self._totals.get(caller, 0) + size
        self._total += size
        forgotten = []
        while self._total > self._max_bytes:
            largest = max(self._totals, key=self._totals.__getitem__)
            forgotten.append(next(iter(self._sizes[largest])))
            self.remove(forgotten[-1])
        return forgotten

    def remove(self, key: StreamKey) -> None:
        """Removes a stream, if it is kept."""
        caller, _ = key
        size = self._sizes.get(caller, {}).pop(key, None)
        if size is None:
            return
        self._total -= size
        self._totals[caller] -= size
        if not self._sizes[caller]:
            del self._sizes[caller], self._totals[caller]
