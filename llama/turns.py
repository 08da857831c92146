"""Runs the calls on one object one after another, in a thread of its own.

Python runs signal handlers only in the main thread. So Ctrl-C never interrupts a step of the
engine: it ends the caller's wait, and the call stops after the running step. The next call waits
until then.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

# An endless wait would not end on `_thread.interrupt_main`, which some editors use for Ctrl-C.
POLL_INTERVAL = 0.1  # seconds


class Turns:
    """Any thread may call `run`; calls begin in the order in which they arrive."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        """Calls `prepare` in the new thread before the first call."""
        self._executor = ThreadPoolExecutor(1, "llama", initializer=prepare)

    def run(self, call: Callable[[threading.Event], T]) -> T:
        """The result of `call`, which receives an event that is set if its caller stops waiting."""
        abandoned = threading.Event()
        try:
            future = self._executor.submit(call, abandoned)
            while not future.done():
                wait([future], POLL_INTERVAL)
        except BaseException:
            abandoned.set()
            raise
        return future.result()
