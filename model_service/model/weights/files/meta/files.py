"""Opens the files of Meta's checkpoint: checks their bytes, and maps their tensors.

No file is trusted: it may be cut short, damaged, or hold code instead of tensors.
"""

import os
import pickle
import re
import reprlib
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model_service.model.errors import FETCH_AGAIN, READABLE, CheckpointError
from serving.telemetry.progress import Advance, progress

_CHECKSUM_THREADS = 16
_READ_BYTES = 2**22


def check_archive(path: Path, *, verify: bool) -> None:
    """Raises CheckpointError unless `path` is a whole zip archive, with `verify` undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        damaged = _damaged(path, names) if verify else None
    except zipfile.BadZipFile:
        raise CheckpointError(
            path,
            "is cut short, or not in the format that torch.save writes since version 1.6",
            f"{FETCH_AGAIN}; a file in the old format: torch.save(torch.load(...)) it once",
        ) from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", READABLE) from error
    if damaged is not None:
        raise CheckpointError(path, f"is damaged: {damaged} fails its checksum", FETCH_AGAIN)


def _damaged(path: Path, names: list[str]) -> str | None:
    """The first of the tensors `names` that fails its checksum.

    Several threads compute checksums, because one is slower than a good disk. The files stay in
    the page cache, where loading finds them.
    """
    threads = min(_CHECKSUM_THREADS, os.cpu_count() or 1)
    label, size = f"verifying {path.name}", path.stat().st_size
    with progress(label, size) as advance, ThreadPoolExecutor(threads) as pool:
        shares = [names[i::threads] for i in range(threads)]
        found = pool.map(_first_damaged, [path] * threads, shares, [advance] * threads)
        damaged = {name for name in found if name is not None}
    return next((name for name in names if name in damaged), None)


def _first_damaged(path: Path, names: list[str], advance: Advance) -> str | None:
    with zipfile.ZipFile(path) as archive:
        for name in names:
            try:
                with archive.open(name) as record:
                    while piece := record.read(_READ_BYTES):
                        advance(len(piece))
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
                return name
    return None


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            path,
            f"refused: it holds {_forbidden_object(error)}, not only tensors, and could run code",
            "use the file from Meta, or save the plain state dictionary",
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        problem = f"cannot be read as a checkpoint: {error}"
        raise CheckpointError(path, problem, FETCH_AGAIN) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(path, "holds no dictionary of tensors", FETCH_AGAIN)
    for name, value in content.items():
        _check_wrapping(path, name, value)
    for name, value in content.items():
        _check_entry(path, name, value)
    return {name: tensor.detach() for name, tensor in content.items()}


def _check_wrapping(path: Path, name: object, value: object) -> None:
    """Raises CheckpointError if the tensors are inside an entry, such as `state_dict`."""
    shown = reprlib.repr(name)
    if isinstance(value, dict) and any(isinstance(each, torch.Tensor) for each in value.values()):
        raise CheckpointError(
            path,
            f"holds its tensors inside {shown}",
            f"unpack them once: torch.save(torch.load(path, weights_only=True)[{shown}], path)",
        )


def _check_entry(path: Path, name: object, value: object) -> None:
    """Raises CheckpointError unless the entry is a named tensor with all its numbers."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(
            path, f"{reprlib.repr(name)} is not a tensor with a name", FETCH_AGAIN
        )
    if value.is_meta:
        raise CheckpointError(
            path, f"{name} is on the device meta: it has a shape and no numbers", FETCH_AGAIN
        )
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise CheckpointError(
            path, f"{name} is stored as {layout}", "save it as a dense tensor: tensor.to_dense()"
        )


def _forbidden_object(error: pickle.UnpicklingError) -> str:
    """The name of the object that the unpickler refused, such as `posix.system`."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else "Python objects"
