"""Checks that the files of a model are whole: one result for each file. Imports no PyTorch.

Headers are compared with sizes first, which needs no reading. Then each file is read once: against
a checksum that came with it, or else, for .pth archives, against those that the archive holds.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from model_service.model.errors import FETCH_AGAIN, READABLE, CheckpointError
from model_service.model.weights.files.weight_files import INDEX, read_index, weight_files
from model_service.offline.checksums import Checksum, hub_checksum, listed_checksums
from model_service.offline.stored_model import READERS

# The other files of a model, which are read whole to see whether they are JSON.
_JSON = "*.json"
_READ_BYTES = 2**22
_THREADS = 8
_Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class FileCheck:
    """The result for one file.

    Attributes:
        path: of the file.
        text: how it was checked, or the problem and the remedy.
        whole: whether no problem was found.
    """

    path: Path
    text: str
    whole: bool = True


def verify(path: Path, advance: _Advance) -> Iterator[FileCheck]:
    """Checks the files of the model at `path`, a folder or a GGUF file, in the order of names.

    `advance` is told the bytes that were read, by several threads.

    Raises:
        CheckpointError: there is no model at `path`.
    """
    missing = _missing_part(path)
    if missing is not None:
        yield missing
    folder = path if path.is_dir() else path.parent
    listed = {folder / name: checksum for name, checksum in listed_checksums(folder).items()}
    files = files_to_verify(path)
    for file in sorted(listed.keys() - files):
        if path.is_dir():
            text = f"not found, and {listed[file].origin} lists it. To fix: {FETCH_AGAIN}."
            yield FileCheck(file, text, whole=False)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        checks = pool.map(lambda file: _check(file, listed.get(file), advance), files)
        # An index with a missing file is at fault with the same line.
        yield from (check for check in checks if check != missing)


def files_to_verify(path: Path) -> list[Path]:
    """The files of the model at `path` that exist: weights, JSON, and those with a checksum.

    Raises:
        CheckpointError: there is neither a folder nor a file at `path`.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(path, "not found", "name the folder or the GGUF file of a model")
    patterns = (*(f"*{suffix}" for suffix in READERS), _JSON)
    found = {file for pattern in patterns for file in path.glob(pattern)}
    found |= {path / name for name in listed_checksums(path) if is_plain_file(path / name)}
    found |= {file for file in path.iterdir() if hub_checksum(file) is not None}
    return sorted(found)


def is_plain_file(path: Path) -> bool:
    """Whether a name in a list is that of a file with an end, which a device may not have."""
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def size_of(path: Path) -> int:
    """The bytes of a file; 0 if there are none to read, as of a link that leads nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _missing_part(path: Path) -> FileCheck | None:
    """The first part of a model that is not there, while others are."""
    try:
        weight_files(path)
    except CheckpointError as error:
        if not path.is_dir() or not files_to_verify(path):
            raise
        return FileCheck(error.path, f"{error.problem}. To fix: {error.fix}.", whole=False)
    return None


def _check(path: Path, listed: Checksum | None, advance: _Advance) -> FileCheck:
    try:
        return FileCheck(path, _checked(path, listed or hub_checksum(path), advance))
    except CheckpointError as error:
        return FileCheck(error.path, f"{error.problem}. To fix: {error.fix}.", whole=False)
    except OSError as error:
        reason = error.strerror or str(error)
        text = f"cannot be read: {reason}. To fix: {READABLE}."
        return FileCheck(path, text, whole=False)


def _checked(path: Path, checksum: Checksum | None, advance: _Advance) -> str:
    """The ways in which the file was checked; raises CheckpointError if it is not whole."""
    ways = []
    if path.suffix in READERS:
        tensors = READERS[path.suffix](path)
        ways.append(f"header of {len(tensors)} tensors fits the size")
    elif path.suffix == ".json":
        ways.append(_check_json(path))
    if checksum is not None:
        if not checksum.matches(path, advance):
            problem = f"is damaged: its checksum is not the {checksum}"
            raise CheckpointError(path, problem, FETCH_AGAIN)
        ways.append(str(checksum))
    elif path.suffix == ".pth":
        ways.append(_check_archive(path, advance))
    else:
        advance(path.stat().st_size)
    if path.suffix in READERS and checksum is None and path.suffix != ".pth":
        ways.append("no checksum to compare")
    return ", ".join(ways)


def _check_json(path: Path) -> str:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}", FETCH_AGAIN) from None
    if path.name == INDEX:
        return _check_index(path, read_index(path))
    return "JSON"


def _check_index(path: Path, weight_map: dict[str, str]) -> str:
    """Compares the tensors that an index names with those in the files."""
    held: dict[str, set[str]] = {}
    for file in sorted(set(weight_map.values())):
        held[file] = {tensor.name for tensor in READERS[".safetensors"](path.parent / file)}
    for name, file in weight_map.items():
        if name not in held[file]:
            problem = f"says that {name} is in {file}, and it is not"
            raise CheckpointError(path, problem, "download the index and its files again")
    return f"index of {len(weight_map)} tensors"


def _check_archive(path: Path, advance: _Advance) -> str:
    """Compares each entry of a .pth archive with its CRC-32."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            try:
                with archive.open(entry) as file:
                    while piece := file.read(_READ_BYTES):
                        advance(len(piece))
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
                problem = f"is damaged: {entry.filename} fails its checksum"
                raise CheckpointError(path, problem, FETCH_AGAIN) from None
    return f"CRC-32 of {len(entries)} entries"
