"""How long a request would wait in the queue, and the refusal of one that would wait too long."""

from collections.abc import Callable

from gateway.admission.fair_queue import FairQueue
from gateway.admission.throughput import ThroughputEstimator
from serving.errors import resource_exhausted
from serving.numbers import format_apart
from serving.security.caller import Caller

# Bounds of the time after which a refused request is told to retry, in seconds.
_MIN_RETRY, _MAX_RETRY = 1.0, 60.0


class WaitEstimate:
    """Estimates waits from the queue and the measured throughput."""

    def __init__(
        self, queue: FairQueue, throughput: ThroughputEstimator, clock: Callable[[], float]
    ) -> None:
        self._queue = queue
        self._throughput = throughput
        self._clock = clock

    def require_in_time(
        self, key: Caller, priority: int, tokens: int, deadline: float | None
    ) -> None:
        """RESOURCE_EXHAUSTED if a request of so many tokens would be granted after its deadline.

        `deadline` is a time of the clock; None is without one.
        """
        if deadline is None:
            return
        wait = self._seconds(key, priority, tokens)
        remaining = deadline - self._clock()
        if wait is not None and wait > remaining:
            waiting, left = format_apart(wait, max(remaining, 0))
            raise resource_exhausted(
                f"the queue is too long: the request would wait about {waiting} seconds, and its "
                f"deadline is in {left}",
                "deadline",
                _bounded(wait - remaining),
            )

    def retry_after(self, key: Caller, priority: int) -> float:
        """Seconds until what would be served before a request of the key now has been served."""
        wait = self._seconds(key, priority, 0)
        return _MIN_RETRY if wait is None else _bounded(wait)

    def _seconds(self, key: Caller, priority: int, own_tokens: int) -> float | None:
        """Seconds until the last of a request's tickets is granted; None while too little is known.

        First the work ahead in the fair order must be served, and then about one generation like
        the request's own must end.
        """
        ahead = self._queue.tokens_ahead(key.name, key.limits.weight, priority)
        return self._throughput.seconds(ahead + own_tokens, self._clock())


def _bounded(seconds: float) -> float:
    return min(max(seconds, _MIN_RETRY), _MAX_RETRY)
