"""The services' log lines as `chasqui serve` reads them."""

import json

from chasqui.cli.serve.service_log import (
    as_json,
    failure,
    is_below,
    listening_address,
    own_line,
    readable,
)

LISTENING = '{"address": "127.0.0.1:5", "event": "listening", "level": "info"}'
FAILED = '{"event": "no such file", "level": "critical", "path": "a b"}'


def test_the_address_is_read_from_the_log() -> None:
    assert listening_address(LISTENING) == "127.0.0.1:5"
    assert listening_address(FAILED) is None
    assert listening_address("Traceback (most recent call last):") is None
    assert listening_address("[1, 2]") is None


def test_log_lines_are_made_readable() -> None:
    assert readable(LISTENING) == "listening address=127.0.0.1:5"
    assert readable("not JSON") == "not JSON"


def test_log_lines_become_json_objects_that_name_their_service() -> None:
    assert json.loads(as_json("model-1", LISTENING)) == {
        "service": "model-1",
        **json.loads(LISTENING),
    }
    assert json.loads(as_json("a", "Traceback")) == {"service": "a", "event": "Traceback"}
    assert json.loads(as_json("a", "[1, 2]")) == {"service": "a", "event": "[1, 2]"}
    assert {"level": "warning", "event": "hm", "port": 5}.items() <= json.loads(
        own_line("warning", "hm", port=5)
    ).items()


def test_lines_below_the_level_are_told_from_others() -> None:
    assert is_below("warning", LISTENING)
    assert not is_below("info", LISTENING)
    assert not is_below("error", FAILED)
    assert not is_below("error", "Traceback (most recent call last):")


def test_of_last_lines_the_errors_are_kept() -> None:
    assert failure([FAILED, LISTENING, "noise"]) == "no such file path=a b"
    assert failure([FAILED, FAILED]) == "no such file path=a b"
    assert failure([FAILED, FAILED.replace("file", "port")]) == (
        "no such file path=a b; no such port path=a b"
    )
    assert failure(["one", "  two"]) == "its last lines were: one; two"
    assert failure([]) == "it wrote nothing"
