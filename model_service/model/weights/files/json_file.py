"""Reads a file that holds one JSON object."""

import json
from pathlib import Path
from typing import Any

from model_service.model.errors import CheckpointError


def read_json_object(path: Path, *, if_missing: str) -> dict[str, Any]:
    """The object in the file.

    Args:
        path: the file.
        if_missing: the fix that the error names if the file does not exist.

    Raises:
        CheckpointError: the file is missing, cannot be read, is not JSON, or has a name twice in
            one object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except FileNotFoundError:
        raise CheckpointError(path, "not found", if_missing) from None
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read: {error.strerror}", "make it readable"
        ) from error
    except _TwiceError as error:
        raise CheckpointError(path, f"names {error} twice", "copy it again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}", "copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, "holds no JSON object", "copy it again")
    return content


class _TwiceError(ValueError):
    """A name that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise _TwiceError(name)
        content[name] = value
    return content
