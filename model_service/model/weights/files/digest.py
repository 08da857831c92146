"""A digest of weights, for formats that have no checksums."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_HASHING_THREADS = 16
_CHUNK_BYTES = 2**24


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and all bytes of `tensors`, hexadecimal.

    Several threads read and hash the bytes in pieces of 16 MiB, whose hashes are hashed in turn.
    """
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
        total = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name]
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for piece in pool.map(_hash, _pieces(tensor)):
                total.update(piece)
    return total.hexdigest()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    values = tensor.reshape(-1).view(torch.uint8)
    for begin in range(0, len(values), _CHUNK_BYTES):
        yield values[begin : begin + _CHUNK_BYTES]


def _hash(piece: torch.Tensor) -> bytes:
    return hashlib.sha256(piece.numpy().data).digest()
