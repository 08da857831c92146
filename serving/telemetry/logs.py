"""Structured logs on stderr, one event per line, for this project and its libraries.

Logs contain ids, sizes and times; never log prompts or answers.
"""

import logging
import sys
from typing import NoReturn

import structlog
from structlog.typing import Processor

from serving.settings import ServerSettings


def configure(settings: ServerSettings) -> None:
    """Sets up the logs of the process; call once."""
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
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_departed_client)


def exit_with_error(message: str) -> NoReturn:
    """Ends the process with status 1 and one line in the format of the logs."""
    structlog.stdlib.get_logger(__name__).critical(message)
    raise SystemExit(1)


def _is_no_departed_client(record: logging.LogRecord) -> bool:
    """False for an error that gRPC logs if a client leaves just as its answer is sent.

    That a client leaves is no error, and at any other moment gRPC does not log it.
    """
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


def _text() -> list[Processor]:
    # Not rich's tracebacks, because they print local variables, which may contain prompts.
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    ]


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
