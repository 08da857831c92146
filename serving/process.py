"""A service's process: its start, its end, and how it uses memory."""

import asyncio
import ctypes
import gc
import os
from collections.abc import Coroutine
from typing import TypeVar

import structlog

from serving.errors import StartError
from serving.settings import ServerSettings, misspelt_variables, parse
from serving.telemetry import logs

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 128 * 1024
_MAX_KEPT = 1024 * 1024

S = TypeVar("S", bound=ServerSettings)

_log = structlog.stdlib.get_logger(__name__)


def configure(settings_class: type[S], prog: str) -> S:
    """Reads the settings and sets up the logs; the first call of every `main`."""
    settings = parse(settings_class, prog)
    logs.configure(settings)
    for variable, nearest in misspelt_variables(settings_class, os.environ).items():
        _log.warning("unknown variable, ignored", variable=variable, nearest=nearest)
    return settings


def run(service: Coroutine[None, None, None]) -> None:
    """Runs a service to its end; a `StartError` ends the process with status 1 and one line."""
    return_freed_memory()
    try:
        asyncio.run(service)
    except StartError as error:
        logs.exit_with_error(str(error))


def return_freed_memory() -> None:
    """Makes glibc's allocator return freed messages to the system at once.

    By default glibc raises its threshold for this with the first large block that is freed, up to
    32 MiB, and a process that once held many large messages keeps their memory. Not for the model
    service: PyTorch's tensors would be paged in anew with each step. Does nothing with other C
    libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _MAX_KEPT)


def freeze_gc() -> None:
    """Exempts all objects that exist now from garbage collection; call after loading.

    By default Python makes a full collection only when the objects that became old since the last
    one are a quarter of all old ones. A server loads so many objects that this takes tens of
    thousands more: garbage that outlived the young generations stays for many minutes, and each
    full collection walks all loaded objects. With those frozen, full collections are cheap and
    regular.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # resets the count of old objects, now close to zero
