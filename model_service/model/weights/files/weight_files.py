"""The files that hold the weights of a model. Imports no PyTorch."""

from pathlib import Path

from llama.model_files import ACCEPTED, GGUF, HUGGING_FACE, META, no_weights, weight_format
from model_service.model.errors import FETCH_AGAIN, CheckpointError
from model_service.model.weights.files.json_file import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"


def weight_files(path: Path) -> tuple[str, list[Path]]:
    """The format of the model at `path`, and its files with weights, all of which are there.

    Raises:
        CheckpointError: there is no model, or a file of it is missing.
    """
    form = weight_format(path)
    if form == META:
        return META, shard_files(path)
    if form == HUGGING_FACE:
        return HUGGING_FACE, safetensors_files(path)
    if form == GGUF:
        return GGUF, [_gguf_file(path)]
    if path.is_dir():
        refuse_other_weights(path)
    raise CheckpointError(path, no_weights(path), ACCEPTED)


def _gguf_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(path, no_weights(path), ACCEPTED)
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(
            path, f"holds several GGUF files: {names}", "name one of them, not the folder"
        )
    return files[0]


def shard_files(folder: Path) -> list[Path]:
    """Meta's files in their order, which are numbered without a gap."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise CheckpointError(
            folder / "consolidated.00.pth",
            "not found",
            "name the folder that holds params.json and consolidated.*.pth",
        )
    for number, path in enumerate(paths):
        expected = f"consolidated.{number:02d}.pth"
        if path.name != expected:
            raise CheckpointError(
                folder / expected, f"not found, though {path.name} is there", FETCH_AGAIN
            )
    return paths


def safetensors_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the files that the index names, all of which are there."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    return [folder / file for file in sorted(set(tensor_places(folder).values()))]


def tensor_places(folder: Path) -> dict[str, str]:
    """The name of the file that holds each tensor, as the index states it."""
    index = folder / INDEX
    if not index.exists():
        _refuse_without_index(folder)
    return read_index(index)


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


def _refuse_without_index(folder: Path) -> None:
    """Raises CheckpointError: a folder has neither file by which its weights are found."""
    if part := next(folder.glob("*.safetensors"), None):
        raise CheckpointError(
            folder / INDEX, f"not found, though {part.name} is there", "download it, too"
        )
    refuse_other_weights(folder)
    raise CheckpointError(
        folder / SINGLE, f"not found, and neither is {INDEX}", "download one of them"
    )


def refuse_other_weights(folder: Path) -> None:
    """Raises CheckpointError if the folder holds weights of a kind that is not read."""
    if found := next(folder.glob("pytorch_model*.bin"), None):
        raise CheckpointError(
            folder,
            f"holds its weights as {found.name}, which may run code when it is read",
            "convert them once to safetensors: transformers.AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(new_folder)",
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            folder,
            "holds an adapter, not a model",
            "merge it into its model with peft, and serve that",
        )
