"""Generates `client/sync.py` from `client/aio.py`, or with --check reports that the two differ.

Run through `make sync-client`. unasync drops `async` and `await` and replaces names, those of NAMES
included; phrases of docstrings are replaced as text; ruff sorts the imports and formats the result.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "client" / "aio.py"
GENERATED = ROOT / "client" / "sync.py"

NAMES = {
    "AsyncClient": "Client",
    "asyncio": "time",  # for `asyncio.sleep`, which is all that the source uses
    "cancel_streams_aio": "cancel_streams",
    "explained_aio": "explained",
    "open_aio_channel": "open_channel",
}
PHRASES = {
    "for the event loop that it is made in": "which threads may share",
    "Use it in `async with`": "Use it in `with`",
}
HEAD = '''\
# Generated from client/aio.py by `make sync-client`. Do not edit.
"""The synchronous client.

A stream is a generator that owns its call, and further calls after the connection was lost. Leaving
its loop closes the generator, which cancels the stream, and the servers free what it held within
one step of the engine.
"""
'''


def generate() -> str:
    """The source of the synchronous client."""
    source = re.sub(r'\A""".*?"""\n', "", SOURCE.read_text("utf-8"), flags=re.DOTALL)
    for phrase, replacement in PHRASES.items():
        if phrase not in source:
            raise SystemExit(f"{SOURCE} does not hold {phrase!r}: adapt PHRASES in {__file__}")
        source = source.replace(phrase, replacement)
    return _ruff("format", text=_ruff("check", "--select=I", "--fix", text=HEAD + _unasync(source)))


def _unasync(source: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch, "aio", "client.py"), Path(scratch, "sync", "client.py")
        before.parent.mkdir()
        before.write_text(source, "utf-8")
        rule = unasync.Rule("/aio/", "/sync/", additional_replacements=NAMES)
        unasync.unasync_files([str(before)], [rule])
        return after.read_text("utf-8")


def _ruff(*arguments: str, text: str) -> str:
    # The one beside this interpreter: .venv need not be on the PATH.
    command = [str(Path(sys.executable).with_name("ruff")), *arguments, "--quiet"]
    done = subprocess.run(  # noqa: S603
        [*command, f"--stdin-filename={GENERATED}", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"ruff {arguments[0]} failed: {done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    generated = generate()
    if not parser.parse_args().check:
        GENERATED.write_text(generated, "utf-8")
    elif GENERATED.read_text("utf-8") != generated:
        sys.exit(f"stale, run `make sync-client`: {GENERATED.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
