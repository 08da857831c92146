"""The checksums that come with the files of a model, and the lists that Chasqui writes.

Meta's downloads have lists that md5sum writes; many others have SHA256SUMS, which sha256sum
writes. Files from Hugging Face's hub have a checksum in the name of the blob that a link in its
cache points to, or in `.cache/huggingface/download/NAME.metadata` beside files in a local folder.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKLIST = "checklist.chk"
SHA256SUMS = "SHA256SUMS"
_LISTS = {CHECKLIST: "md5", "tokenizer_checklist.chk": "md5", SHA256SUMS: "sha256"}
_LINE = re.compile(r"([0-9a-fA-F]{32,64}) [ *](.+)")
_READ_BYTES = 2**22
# Lengths of a checksum in hexadecimal: the hub names large files by SHA-256, others as git does.
_HUB = {64: "sha256", 40: "git"}
_NAMES = {"md5": "MD5", "sha256": "SHA-256", "git": "git's SHA-1"}


@dataclass(frozen=True, slots=True)
class Checksum:
    """The checksum that a file should have.

    Attributes:
        algorithm: md5, sha256, or git for the SHA-1 of a blob.
        digest: hexadecimal.
        origin: what states it, for people.
    """

    algorithm: str
    digest: str
    origin: str

    def __str__(self) -> str:
        return f"{_NAMES[self.algorithm]} of {self.origin}"

    def matches(self, path: Path, advance: Callable[[int], None]) -> bool:
        """Whether the file at `path` has it; `advance` is told the bytes that were read."""
        return file_digest(path, self.algorithm, advance) == self.digest


def listed_checksums(folder: Path) -> dict[str, Checksum]:
    """The checksums in the lists of `folder`, by the names of files; a name may not exist."""
    found: dict[str, Checksum] = {}
    for name, algorithm in _LISTS.items():
        if (folder / name).is_file():
            sums = read_list(folder / name)
            found |= {file: Checksum(algorithm, digest, name) for file, digest in sums.items()}
    return found


def hub_checksum(path: Path) -> Checksum | None:
    """The checksum that Hugging Face's hub left for the file at `path`."""
    if path.is_symlink() and path.readlink().parent.name == "blobs":
        return _of_hub(path.readlink().name, "the hub's cache")
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if metadata.is_file():
        lines = metadata.read_text("utf-8", "replace").splitlines()
        return _of_hub(lines[1], "the hub's download") if len(lines) > 1 else None
    return None


def _of_hub(tag: str, origin: str) -> Checksum | None:
    algorithm = _HUB.get(len(tag))
    if algorithm is None or re.fullmatch(r"[0-9a-f]+", tag) is None:
        return None
    return Checksum(algorithm, tag, origin)


def file_digest(path: Path, algorithm: str, advance: Callable[[int], None]) -> str:
    """The checksum of a file, hexadecimal. It is read piece by piece."""
    if algorithm == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def read_list(path: Path) -> dict[str, str]:
    """The lines of a list as md5sum and sha256sum write it; other lines are left out."""
    lines = path.read_text("utf-8", "replace").splitlines()
    found = filter(None, map(_LINE.fullmatch, lines))
    return {match[2].removeprefix("./"): match[1].lower() for match in found}


def write_list(path: Path, digests: Mapping[str, str]) -> None:
    """Writes a list; a reader never sees half of it."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(lines), "utf-8")
    new.replace(path)
