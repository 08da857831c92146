"""Lets the event loop go on during work that takes long in one piece."""

import asyncio
import time

# Seconds: little beside the gap between two tokens of a stream.
_STEP = 0.004


class TimeSlice:
    """Counts the time of one piece of work that asks for `breathe` between its steps."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    async def yield_if_over(self) -> None:
        """Others run now, if this work has gone on for a step without them."""
        if time.monotonic() - self._since > _STEP:
            await asyncio.sleep(0)
            self._since = time.monotonic()
