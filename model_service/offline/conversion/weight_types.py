"""The types in which a converted model stores its weights."""

import torch

from model_service.model.config import ModelConfig
from model_service.offline.conversion.hugging_face_format import hugging_face_name
from model_service.offline.stored_model import StoredModel

TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# For weights that are stored in fewer bits: it keeps more of their digits than bfloat16.
FOR_QUANTIZED = torch.float16


def weight_types(
    stored: StoredModel, config: ModelConfig, given: str | None
) -> dict[str, torch.dtype]:
    """The type of each parameter, by Meta's names: `given`, or else the one it is stored in.

    In GGUF files, whose names are others, all weights get the type of the largest.
    """
    if given is not None:
        return dict.fromkeys(config.parameter_shapes(), TYPES[given])
    headers = [tensor for file in stored.files for tensor in file.tensors]
    found = {tensor.name: tensor.dtype for tensor in headers}
    largest = max(headers, key=lambda tensor: tensor.size).dtype
    common = TYPES.get(largest, FOR_QUANTIZED)
    types = {}
    for name in config.parameter_shapes():
        # A tied output has no tensor of its own.
        own = found.get(name) or found.get(hugging_face_name(name)) or largest
        types[name] = TYPES.get(own, common)
    return types
