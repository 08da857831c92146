"""What gRPC's core writes to stderr by itself, a line for each handshake that fails, becomes log
lines like all others and as few. For servers that strangers can reach: who connects again and again
would fill the disk.

Nothing less than the file descriptor will do, as the core writes to that. All else that libraries
write there passes through; the process's own stderr does not take this way.
"""

import contextlib
import faulthandler
import os
import re
import sys
import threading
from collections import defaultdict
from functools import partial
from typing import TextIO

import structlog

from serving.seldom import Seldom

LOG_SECONDS = 60.0

# As in "I1121 13:16:15.135737    7197 ssl_transport_security.cc:2563] Handshake failed …".
_LINE = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ (?P<place>[\w.]+:\d+)\] (?P<text>.*)")

_log = structlog.stdlib.get_logger(__name__)


def gather() -> None:
    """Call once, before logs are configured; lasts until the process ends."""
    stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    sys.stderr = stderr
    # A crash leaves no time to read the pipe.
    faulthandler.enable(stderr)
    lines = os.fdopen(reader, errors="backslashreplace")
    threading.Thread(target=_follow, args=(lines, stderr), daemon=True, name="core-log").start()


def _follow(lines: TextIO, stderr: TextIO) -> None:
    places: defaultdict[str, Seldom] = defaultdict(partial(Seldom, LOG_SECONDS))
    for line in lines:
        if found := _LINE.match(line):
            place, text = found["place"], found["text"]
            places[place].warn(_log, "gRPC says", place=place, text=text)
        else:
            # Whatever becomes of it, such as of a full disk: the lines to come are still read.
            with contextlib.suppress(OSError):
                stderr.write(line)
