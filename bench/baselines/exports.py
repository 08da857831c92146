"""Exports of a checkpoint: GGUF, with the `gguf` package's own quantizers, and Hugging Face's.

GGUF needs the extra `bench`. Meta rotates neighbouring features (0 with 1, 2 with 3), and so does
GGUF's architecture `llama`.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.baselines.environments import UnavailableError
from bench.checkpoint import complete_or_absent
from bench.engine.driver import in_own_process
from model_service.model.config import ROPE_THETA
from model_service.model.weights.conversion.write_hugging_face import write_hugging_face
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.source import Shard

CONTEXT_LENGTH = 4096
CPU = torch.device("cpu")
BYTES_END = 3 + 256  # ids 3 to 258 are the bytes in a Llama 2 vocabulary


def ensure_model(kind: str, ckpt_dir: Path, work_dir: Path) -> Path:
    """The checkpoint in a contender's format: a file or folder, exported once.

    Exports run in a process of their own: its memory is free before anything is measured.

    Args:
        kind: meta, hf, or the name of a GGUF type, such as Q8_0.
        ckpt_dir: the shape's checkpoint in Meta's format.
        work_dir: where exports are kept.

    Raises:
        UnavailableError: the export failed, for example because the extra `bench` is not there.
    """
    if kind == "meta":
        return ckpt_dir
    target = work_dir / "exports" / ckpt_dir.name / ("hf" if kind == "hf" else f"{kind}.gguf")
    if not target.exists():
        export = export_hf if kind == "hf" else partial(export_gguf, type_name=kind)
        try:
            with complete_or_absent(target) as unfinished:
                in_own_process(export, ckpt_dir, unfinished)
        except Exception as error:  # the others are measured, whatever it is
            raise UnavailableError(f"export to {kind} failed: {error}") from error
    return target


def model_bytes(path: Path) -> int:
    """Size of a model's weight files."""
    if path.is_file():
        return path.stat().st_size
    files = (*path.glob("*.pth"), *path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def export_hf(ckpt_dir: Path, folder: Path) -> None:
    """Writes config.json and safetensors files into a new folder."""
    write_hugging_face(open_checkpoint(ckpt_dir, verify=False), folder)


def export_gguf(ckpt_dir: Path, file: Path, type_name: str) -> None:
    """Writes a file with all matrices in the type, a name of gguf.GGMLQuantizationType.

    llama.cpp opens no file without a vocabulary, so it names one made-up piece per id; nothing here
    ever turns text into ids.
    """
    import gguf  # noqa: PLC0415  # extra `bench`

    checkpoint = open_checkpoint(ckpt_dir, verify=False)
    config = checkpoint.config
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=False)
    writer.add_name("random weights")
    mostly = "ALL" if type_name == "F32" else "MOSTLY"
    mixture = "_S" if type_name == "Q4_K" else ""
    writer.add_file_type(gguf.LlamaFileType[f"{mostly}_{type_name}{mixture}"])
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_vocab_size(config.vocab_size)
    kinds = gguf.TokenType
    ordinary = config.vocab_size - BYTES_END
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"piece{number}" for number in range(ordinary)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * config.vocab_size)
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
    writer.add_token_types(types + [kinds.NORMAL] * ordinary)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kind = gguf.GGMLQuantizationType[type_name]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    for name, weight in checkpoint.read_shard(Shard(0, 1, torch.float32, CPU)):
        values, key = weight.numpy(), str(names.get_name(name, try_suffixes=(".weight",)))
        if values.ndim == 1 or type_name == "F32":  # llama.cpp wants float32 norms
            writer.add_tensor(key, values)
        else:
            writer.add_tensor(key, _quantized(values, type_name), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantized(values: NDArray[np.float32], type_name: str) -> NDArray[np.uint8]:
    """The blocks of a matrix: for Q4_K, which the package only reads, random ones."""
    import gguf  # noqa: PLC0415  # extra `bench`

    kind = gguf.GGMLQuantizationType[type_name]
    if type_name != "Q4_K":
        blocks: NDArray[np.uint8] = gguf.quantize(values, kind)
        return blocks
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (len(values), values.shape[1] // weights, size)
    blocks = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    # The scales, float16 numbers: the weights are then of the size of a trained network's.
    blocks[..., :4] = np.array([2.5e-4, 2.5e-4], np.float16).view(np.uint8)
    return blocks.reshape(len(values), -1)
