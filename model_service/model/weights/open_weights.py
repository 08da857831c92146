"""Opens the weights that a path holds, in whatever format they are."""

from pathlib import Path

from llama.model_files import HUGGING_FACE, META, weight_format
from model_service.model.weights.files.gguf.gguf_file import open_gguf
from model_service.model.weights.files.hugging_face import open_hugging_face
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.files.weight_files import weight_files
from model_service.model.weights.source import WeightSource


def open_weights(path: Path, *, verify: bool = True) -> WeightSource:
    """Opens and checks the weights at `path`.

    Args:
        path: a folder in Meta's or Hugging Face's format, or with one GGUF file; or that file. In a
            folder with several, Meta's goes before Hugging Face's, and that before GGUF.
        verify: compare every tensor with its checksum, if the format has checksums.

    Raises:
        CheckpointError: there are no weights, or they are damaged or not supported; the message
            names the file and the fix.
    """
    form = weight_format(path)
    if form == META:  # which may be incomplete: the reader says what is missing
        return open_checkpoint(path, verify=verify)
    if form == HUGGING_FACE:
        return open_hugging_face(path)
    _, [file] = weight_files(path)
    return open_gguf(file)
