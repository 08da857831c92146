"""The names, types and shapes of the tensors in a .pth file, read without PyTorch.

torch.save writes a zip archive. Its entry `data.pkl` describes the tensors, and their numbers are
entries of their own. The unpickler here knows the few names that describe tensors and refuses all
others, so no code of the file runs.
"""

import collections
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_service.model.errors import FETCH_AGAIN, READABLE, CheckpointError
from model_service.offline.headers.tensor_header import TensorHeader, bytes_of

# PyTorch's classes of storages, by which older types are stored.
_STORAGE_TYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}
# Newer types are named by themselves.
_TYPES = {*_STORAGE_TYPES.values(), "float8_e4m3fn", "float8_e5m2"}


def read_pth_header(path: Path) -> list[TensorHeader]:
    """The tensors of the archive at `path`, in its order.

    Raises:
        CheckpointError: the file is cut short, cannot be read, or holds anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [entry] = [each for each in archive.namelist() if each.endswith("/data.pkl")]
            with archive.open(entry) as file:
                content = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", READABLE) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            path, f"refused: {error}", "use the file from its publisher, in which are only tensors"
        ) from None
    except Exception as error:  # a damaged file may raise anything
        problem = "is cut short, damaged, or not in the format that torch.save writes"
        raise CheckpointError(path, problem, FETCH_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(path, "holds no dictionary of tensors", FETCH_AGAIN)
    return [
        TensorHeader(name, each.dtype, each.shape, bytes_of(each.dtype, each.shape))
        for name, each in content.items()
        if isinstance(name, str) and isinstance(each, _Described)
    ]


@dataclass(frozen=True, slots=True)
class _Described:
    """A tensor without its numbers."""

    dtype: str
    shape: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _rebuilt
            case "torch._utils", "_rebuild_tensor_v3":
                return _rebuilt_of_type
            case "torch._utils", "_rebuild_parameter":
                return _parameter
            case "torch" | "torch.storage", _ if name in _STORAGE_TYPES:
                return _STORAGE_TYPES[name]
            case "torch" | "torch.storage", _ if name in _TYPES or name == "UntypedStorage":
                return name
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not only tensors")

    def persistent_load(self, saved: tuple[Any, ...]) -> str:
        """The type of a storage."""
        _kind, storage, *_ = saved
        return str(storage)


def _rebuilt(dtype: str, _offset: int, shape: tuple[int, ...], *_rest: object) -> _Described:
    return _Described(dtype, shape)


def _rebuilt_of_type(
    _storage: str,
    _offset: int,
    shape: tuple[int, ...],
    _stride: object,
    _gradient: object,
    _hooks: object,
    dtype: str,
    *_rest: object,
) -> _Described:
    return _Described(dtype, shape)


def _parameter(data: _Described, *_rest: object) -> _Described:
    return data
