"""Yields to the event loop during long work that does not wait for anything."""

import asyncio
import time

# Short compared with the gap between two tokens of a stream.
_SECONDS = 0.004


class TimeSlice:
    """The time that one piece of work has run since the event loop last ran other tasks."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    async def yield_if_over(self) -> None:
        """Lets other tasks run if this work has used up its slice; call between its steps."""
        if time.monotonic() - self._began > _SECONDS:
            await asyncio.sleep(0)
            self._began = time.monotonic()
