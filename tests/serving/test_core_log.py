"""What gRPC's core and others write to stderr."""

import subprocess
import sys
from pathlib import Path

# Written as libraries do; more than a pipe holds.
WRITES_MUCH = """
import os
from serving import core_log
core_log.gather()
for _ in range(4096):
    os.write(2, b"x" * 99 + b"\\n")
print("alive")
"""


def test_full_disk_below_the_log_does_not_end_the_reading() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", WRITES_MUCH],
            check=False,
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=60,
        )
    assert done.stdout == b"alive\n"
