"""Shows the client's warnings, such as a lost connection, where the command prints its answer."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def client_warnings(show: Callable[[str], None]) -> Iterator[None]:
    """Passes the text of every warning of the logger "chasqui" to `show`."""
    handler = _Handler(show)
    logger = logging.getLogger("chasqui")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())
