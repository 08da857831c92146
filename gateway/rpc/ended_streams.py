"""Which of the named streams that have ended are kept: as many as fit a number of bytes that all
callers share. Knows only names and sizes, so that fairness can be tested as arithmetic.
"""

StreamKey = tuple[str, str]  # a caller, and the name of a stream among that caller's


class EndedStreams:
    """Sizes of ended streams, by caller.

    When all callers together keep too much, the one that keeps the most loses its oldest stream. So
    no caller loses anything as long as it keeps no more than the bound divided by the number of
    callers that keep streams.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._total = 0
        self._sizes: dict[str, dict[StreamKey, int]] = {}  # by caller, each in the order of ends
        self._totals: dict[str, int] = {}  # by caller

    def add(self, key: StreamKey, size: int) -> list[StreamKey]:
        """Keeps a stream that has ended; returns those that are kept no more."""
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
        """Keeps a stream no more, if it was kept."""
        caller, _ = key
        size = self._sizes.get(caller, {}).pop(key, None)
        if size is None:
            return
        self._total -= size
        self._totals[caller] -= size
        if not self._sizes[caller]:
            del self._sizes[caller], self._totals[caller]
