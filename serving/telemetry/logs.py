"""Structured logs on stderr, of this project and of its libraries alike, one event per line.

Never log what users wrote or what the model answered: ids, sizes and times only.
"""

import logging
import sys
from typing import NoReturn

import structlog
from structlog.typing import Processor

from serving.settings import ServerSettings


def configure(settings: ServerSettings) -> None:
    """Call once, first thing in `__main__`."""
    as_text = settings.log_format == "text" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_text() if as_text else _json()),
            ],
        )
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_departure)


def exit_with_error(message: str) -> NoReturn:
    """Ends the process with status 1 and one line in the format of the logs."""
    structlog.stdlib.get_logger(__name__).critical(message)
    raise SystemExit(1)


def _is_no_departure(record: logging.LogRecord) -> bool:
    """An answer that finds its client gone is no error, and gRPC says nothing of it, unless it
    hears of both at once: then it reports one.
    """
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


def _text() -> list[Processor]:
    # Not rich's tracebacks: those print local variables, and with them what users wrote.
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    ]


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
