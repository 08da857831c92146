"""A checkpoint in llama.cpp's format, quantized by the `gguf` package's own quantizers.

`python -m bench.baselines.export.gguf CHECKPOINT FILE TYPE`; needs the extra `bench`. llama.cpp
opens no file without a vocabulary, so the file names one made-up piece per id; nothing here ever
turns text into ids.
"""

import sys
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, LlamaFileType, TokenType

from bench.baselines.export.layout import gguf_name
from model_service.model.config import ROPE_THETA, ModelConfig
from model_service.model.weights.checkpoint import Checkpoint, open_checkpoint

CONTEXT_LENGTH = 4096
BYTES_END = 3 + 256  # ids 3 to 258 are the bytes in a Llama 2 vocabulary
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}


def export_gguf(ckpt_dir: Path, file: Path, type_name: str) -> None:
    """Writes the checkpoint with all matrices in the type, a key of FILE_TYPES."""
    checkpoint = open_checkpoint(ckpt_dir, verify=False)
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=False)
    _add_config(writer, checkpoint.config, type_name)
    _add_vocabulary(writer, checkpoint.config.vocab_size)
    _add_weights(writer, checkpoint, GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pieces(vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """A vocabulary of Llama 2's structure: three control pieces, the bytes, then ordinary ones."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    names += [f"piece{number}" for number in range(BYTES_END, vocab_size)]
    kinds += [TokenType.NORMAL] * (vocab_size - BYTES_END)
    return names, kinds


def _add_config(writer: gguf.GGUFWriter, config: ModelConfig, type_name: str) -> None:
    writer.add_name("random weights")
    writer.add_file_type(FILE_TYPES[type_name])
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


def _add_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    names, kinds = pieces(vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_weights(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, kind: GGMLQuantizationType
) -> None:
    cpu = torch.device("cpu")
    for name, weight in checkpoint.read_shard(0, 1, torch.float32, cpu):
        values = weight.numpy()
        if values.ndim == 1 or kind is GGMLQuantizationType.F32:  # llama.cpp wants float32 norms
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)


if __name__ == "__main__":
    export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
