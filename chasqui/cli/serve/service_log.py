"""Reads the services' log lines for `chasqui serve`, and writes its own in the same format."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime

LEVELS = ("debug", "info", "warning", "error", "critical")


def listening_address(line: str) -> str | None:
    """The address in a service's log line "listening"; None for any other line."""
    record = _record(line)
    return str(record["address"]) if record.get("event") == "listening" else None


def http_address(line: str) -> str | None:
    """The address in a gateway's log line "serving HTTP", which comes before "listening"."""
    record = _record(line)
    return str(record["http_address"]) if record.get("event") == "serving HTTP" else None


def readable(line: str) -> str:
    """A JSON log line as text; a line that is not JSON (such as a traceback) stays as it is."""
    record = _record(line)
    if "event" not in record:
        return line
    values = (
        f"{name}={value}"
        for name, value in record.items()
        if name not in ("event", "level", "logger", "timestamp")
    )
    return " ".join((str(record["event"]), *values))


def event(line: str) -> str:
    """The event of a log line; empty for a line that is not JSON."""
    return str(_record(line).get("event", ""))


def own_line(level: str, event: str, **values: object) -> str:
    """A log line of `chasqui serve` itself."""
    timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"event": event, **values, "level": level, "timestamp": timestamp})


def as_json(service: str, line: str) -> str:
    """A log line as a JSON object that names its service; other text becomes the event."""
    return json.dumps({"service": service, **(_record(line) or {"event": line})})


def is_below(level: str, line: str) -> bool:
    """Whether a line has a lower level; False for lines without one, such as a traceback's."""
    own = _record(line).get("level")
    return own in LEVELS and LEVELS.index(str(own)) < LEVELS.index(level)


def failure(lines: Sequence[str]) -> str:
    """The reason why a service ended: its error lines, each once (all shards log the same), or the
    last lines of its log.
    """
    errors = list(filter(is_error, lines))
    if errors:
        return "; ".join(dict.fromkeys(map(readable, errors)))
    if not lines:
        return "it wrote nothing"
    return f"its last lines were: {'; '.join(readable(line).strip() for line in lines[-10:])}"


def is_error(line: str) -> bool:
    return _record(line).get("level") in ("error", "critical")


def _record(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
