"""Runs the calls on one object one after another, in a thread of its own.

Python runs signal handlers in the main thread alone. So Ctrl-C never cuts a step of the engine in
two: it ends the caller's wait, and the call then stops after the running step. The next call waits
for that.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

# `_thread.interrupt_main`, by which some editors interrupt, is not heard in an endless wait.
POLL_INTERVAL = 0.1  # seconds


class Turns:
    """Any thread may call `run`; calls begin in the order in which they come."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        """`prepare` is called in the new thread before the first call."""
        self._executor = ThreadPoolExecutor(1, "llama", initializer=prepare)

    def run(self, call: Callable[[threading.Event], T]) -> T:
        """What `call` returns. It gets an event that is set when nobody waits for it any more."""
        abandoned = threading.Event()
        try:
            future = self._executor.submit(call, abandoned)
            while not future.done():
                wait([future], POLL_INTERVAL)
        except BaseException:
            abandoned.set()
            raise
        return future.result()
