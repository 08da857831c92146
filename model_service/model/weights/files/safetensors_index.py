"""The index of a Hugging Face folder, which says in what file each tensor lies.

Imports no PyTorch.
"""

from pathlib import Path

from model_service.model.errors import FETCH_AGAIN, CheckpointError
from model_service.model.weights.files.json_file import read_json_object

INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"


def read_index(index: Path) -> dict[str, str]:
    """The name of the file that holds each tensor; all files are there, in the index's folder.

    Raises:
        CheckpointError: the index is damaged or names a file elsewhere, or one is missing.
    """
    places = read_json_object(index, if_missing=FETCH_AGAIN).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(index, "has no weight_map with the file of each tensor", FETCH_AGAIN)
    for name, file in places.items():
        if not _is_file_name(file):
            raise CheckpointError(
                index,
                f"places {name[:64]} in {str(file)[:64]!r}, which is not the name of a "
                f"{_SUFFIX} file",
                FETCH_AGAIN,
            )
    files = sorted({index.parent / file for file in places.values()})
    if missing := [file for file in files if not file.exists()]:
        problem = f"not found, and {index.name} names it ({len(missing)} of {len(files)} missing)"
        raise CheckpointError(missing[0], problem, "download the missing files")
    return places


def _is_file_name(file: object) -> bool:
    """Whether this can be a file in the folder of the index."""
    if not isinstance(file, str) or Path(file).name != file or not file.endswith(_SUFFIX):
        return False
    try:
        # The length that file systems allow; a lone surrogate has no bytes.
        return len(file.encode()) <= 255 and "\0" not in file
    except UnicodeEncodeError:
        return False
