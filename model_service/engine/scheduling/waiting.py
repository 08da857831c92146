"""The queue of waiting sequences, by priority and then by order of arrival.

A sequence whose next block another sequence is computing right now is parked, so that those behind
it can pass, until `wake` is called with the block's digest. All operations take constant time, but
for the heap's logarithm.
"""

import heapq

from model_service.engine.sequence import Sequence


class WaitingQueue:
    """A heap with lazy deletion, and the parked sequences beside it."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []  # negative priority, arrival
        self._queued: set[Sequence] = set()  # entries of the heap that are not in here are dead
        self._parked: dict[bytes, dict[Sequence, None]] = {}
        self._parked_at: dict[Sequence, bytes] = {}
        self.tokens = 0  # that all of these may still have computed

    def __len__(self) -> int:
        return len(self._queued) + len(self._parked_at)

    def push(self, sequence: Sequence) -> None:
        self.tokens += sequence.limit
        self._enqueue(sequence)

    def first(self) -> Sequence | None:
        """The first sequence that is not parked; it stays in the queue."""
        return self._heap[0][2] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence, parked or not.

        Raises:
            KeyError: it is not here.
        """
        if (digest := self._parked_at.pop(sequence, None)) is None:
            self._dequeue(sequence)
        else:
            del self._parked[digest][sequence]
        self.tokens -= sequence.limit

    def park(self, sequence: Sequence, digest: bytes) -> None:
        """Sets a queued sequence aside until `wake(digest)`."""
        self._dequeue(sequence)
        self._parked_at[sequence] = digest
        self._parked.setdefault(digest, {})[sequence] = None

    def wake(self, digest: bytes) -> None:
        """Puts all sequences parked at `digest` back into the queue, in their old order."""
        for sequence in self._parked.pop(digest, ()):
            del self._parked_at[sequence]
            self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        self._queued.add(sequence)
        heapq.heappush(self._heap, (-sequence.request.priority, sequence.arrival, sequence))

    def _dequeue(self, sequence: Sequence) -> None:
        """Only a cancelled sequence leaves from the middle, and it never comes back."""
        self._queued.remove(sequence)
        while self._heap and self._heap[0][2] not in self._queued:
            heapq.heappop(self._heap)
        if len(self._heap) > 2 * len(self._queued) + 16:  # mostly dead entries
            self._heap = [entry for entry in self._heap if entry[2] in self._queued]
            heapq.heapify(self._heap)
