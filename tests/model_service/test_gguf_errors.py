"""GGUF files that cannot be served are refused with the name of what is wrong, and the fix."""

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.model.errors import CheckpointError
from model_service.model.weights.files.gguf.gguf_file import open_gguf
from model_service.model.weights.files.gguf.header import read_header
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.source import Shard
from tests.model_service.gguf_models import METADATA, Tensors, random_blocks, write_gguf

CPU = torch.device("cpu")
F32 = GGMLQuantizationType.F32
LAYER = {
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
    "attn_norm": (256,),
    "ffn_norm": (256,),
}


def zeros(*shape: int) -> tuple[Any, Any]:
    return np.zeros(shape, np.float32), F32


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The tensors of a network of zeros."""
    layers = {
        f"blk.{layer}.{name}.weight": zeros(*shape)
        for layer in range(2)
        for name, shape in LAYER.items()
    }
    ends = {"token_embd": zeros(128, 256), "output_norm": zeros(256), "output": zeros(128, 256)}
    return layers | {f"{name}.weight": values for name, values in ends.items()}


@pytest.fixture
def write(tensors: Tensors, tmp_path: Path) -> Callable[..., Path]:
    """Writes the network with other metadata or tensors; None removes one."""

    def make(
        metadata: dict[str, Any] | None = None, changed: dict[str, Any] | None = None, **how: Any
    ) -> Path:
        keys = {k: v for k, v in (METADATA | (metadata or {})).items() if v is not None}
        held = {k: v for k, v in (tensors | (changed or {})).items() if v is not None}
        return write_gguf(tmp_path / "model.gguf", held, keys, **how)

    return make


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: ")) as caught:
        list(open_gguf(path).read_shard(Shard(0, 1, torch.float16, CPU)))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "lacks llama.block_count. To fix: convert the model again"),
        ({"llama.block_count": 3}, "holds 2 layers and states llama.block_count 3"),
        ({"llama.block_count": 2**31}, f"llama.block_count is {2**31}, not an integer from 1 to"),
        ({"llama.embedding_length": 0}, "llama.embedding_length is 0, not an integer from 1 to"),
        ({"llama.embedding_length": "256"}, "llama.embedding_length is '256', not an integer"),
        ({"llama.attention.head_count": 7}, "256 is no multiple of llama.attention.head_count 7"),
        ({"llama.attention.head_count_kv": 3}, "n_heads 8 is no multiple of n_kv_heads 3"),
        ({"llama.attention.head_count_kv": [4, 2]}, "is a list of 2 numbers: the layers differ"),
        ({"llama.attention.value_length": 64}, "value_length is 64, and a head has 32 features"),
        ({"llama.rope.dimension_count": 16}, "dimension_count is 16, and a head has 32 features"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan, not a number from"),
        ({"llama.rope.scaling.type": "yarn"}, "by 'yarn' (llama.rope.scaling.type); none, linear"),
        ({"llama.rope.scale_linear": 0.5}, "llama.rope.scaling has factor 0.5, not a number from"),
        ({"llama.vocab_size": 130}, "states llama.vocab_size 130, and token_embd.weight has 128"),
        ({"llama.expert_count": 8}, "holds a mixture of 8 experts (llama.expert_count)"),
        ({"llama.attention.causal": False}, "attends to later tokens (llama.attention.causal)"),
        ({"llama.logit_scale": 0.5}, "unknown key llama.logit_scale, which may change the network"),
        ({"split.count": 3}, "is one of the 3 files of a split model. To fix: merge them: llama-"),
        ({"general.type": "adapter"}, "holds the type 'adapter', not a model"),
        ({"general.alignment": 24}, "general.alignment is 24, not a power of two from 8 on"),
    ],
)
def test_metadata_that_is_wrong_or_asks_for_more_than_llama(
    write: Callable[..., Path], metadata: dict[str, Any], message: str
) -> None:
    refused(write(metadata), message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output_norm.weight": None}, "lacks output_norm.weight"),
        ({"token_embd.weight": None}, "lacks token_embd.weight"),
        ({"blk.0.attn_q.bias": zeros(256)}, "also holds blk.0.attn_q.bias: biases, which Llama"),
        ({"blk.1.ffn_gate_inp.weight": zeros(8, 256)}, "also holds blk.1.ffn_gate_inp.weight. To"),
        (
            {"blk.1.ffn_up.weight": zeros(500, 256)},
            "blk.1.ffn_up.weight is 500 × 256; its metadata makes it 512 × 256",
        ),
        (
            {"blk.1.ffn_up.weight": zeros(2, 512, 256)},
            "blk.1.ffn_up.weight is 2 × 512 × 256 in F32; a tensor has one or two sizes",
        ),
        (
            {"blk.0.ffn_up.weight": (np.zeros((512, 66), np.uint8), GGMLQuantizationType.TQ2_0)},
            "blk.0.ffn_up.weight is stored as TQ2_0; these types are read: F32, F16, BF16, Q8_0, ",
        ),
        ({"rope_freqs.weight": zeros(8)}, "rope_freqs.weight is 8 in F32, not 16 in F32"),
        (
            {"rope_freqs.weight": (np.full(16, 3.0, np.float32), F32)},
            "changes the rotary frequencies in another way than Llama 3 does",
        ),
        (
            {"blk.1.attn_v.weight": (np.full((128, 256), 1e6, np.float32), F32)},
            "layers.1.attention.wv.weight holds NaN, or numbers that are infinite in float16",
        ),
    ],
)
def test_tensors_that_are_not_those_of_llama(
    write: Callable[..., Path], changed: dict[str, Any], message: str
) -> None:
    refused(write(changed=changed), message)


def test_another_architecture(write: Callable[..., Path]) -> None:
    problem = "holds a model of the architecture 'qwen2'; only 'llama' is served. To fix: use a "
    refused(write(architecture="qwen2"), problem)


def test_the_other_byte_order(write: Callable[..., Path]) -> None:
    refused(write(endianess=gguf.GGUFEndian.BIG), "is in big-endian order", "To fix: convert it")


@pytest.mark.parametrize("version", [1, 4])
def test_another_version(write: Callable[..., Path], version: int) -> None:
    path = write()
    data = bytearray(path.read_bytes())
    data[4] = version
    path.write_bytes(data)
    refused(path, f"is in version {version} of GGUF; versions 2 and 3 are read. To fix: convert")


def test_a_type_that_the_library_does_not_know_either(write: Callable[..., Path]) -> None:
    path = write()
    data = path.read_bytes()
    # After its name: the number of dimensions, two sizes, then the type.
    place = data.index(b"blk.1.attn_v.weight") + len("blk.1.attn_v.weight") + 4 + 2 * 8
    path.write_bytes(data[:place] + b"\xf0" + data[place + 1 :])
    refused(path, "blk.1.attn_v.weight is stored as type 240; these types are read: F32")


def test_a_path_that_holds_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.gguf", "not found. To fix: name a GGUF file")
    refused(tmp_path, "cannot be read: Is a directory")
    (tmp_path / "page.gguf").write_text("<html>Not Found</html>")
    refused(tmp_path / "page.gguf", "does not begin with GGUF")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "is empty. To fix: copy or download it again")


def test_a_folder_is_opened_if_it_holds_one_file(write: Callable[..., Path]) -> None:
    path = write()
    (path.parent / "README.md").touch()
    assert open_weights(path.parent).fingerprint() == open_weights(path).fingerprint()
    shutil.copy(path, path.with_name("second.gguf"))
    with pytest.raises(CheckpointError) as caught:
        open_weights(path.parent)
    assert "holds several GGUF files: model.gguf, second.gguf. To fix: name one" in str(
        caught.value
    )


def test_tensors_that_share_bytes(write: Callable[..., Path]) -> None:
    path = write()
    data = path.read_bytes()
    # After its name: the number of dimensions, two sizes, the type, then its place.
    place = data.index(b"blk.1.attn_v.weight") + len("blk.1.attn_v.weight") + 4 + 2 * 8 + 4
    path.write_bytes(data[:place] + bytes(8) + data[place + 8 :])
    refused(path, "is damaged: blk.0.attn_q.weight and blk.1.attn_v.weight share bytes")


@pytest.fixture(scope="module")
def intact(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of which damaged copies are made; one of its tensors is quantized."""
    blocks = random_blocks((512, 256), "Q4_K", 0), GGMLQuantizationType.Q4_K
    path = tmp_path_factory.mktemp("intact") / "intact.gguf"
    return write_gguf(path, tensors | {"blk.0.ffn_up.weight": blocks})


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=50)
def test_a_file_that_is_cut_short_anywhere(intact: Path, share: float) -> None:
    data = intact.read_bytes()
    path = intact.with_name("cut.gguf")
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"cut short|is empty"):
        open_gguf(path)


@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1)), min_size=1)
)
def test_damage_to_the_header_is_refused_or_harmless(
    intact: Path, damage: list[tuple[float, bytes]]
) -> None:
    data = bytearray(intact.read_bytes())
    begin = min(tensor.begin for tensor in read_header(intact, memoryview(data)).tensors.values())
    for share, written in damage:
        place = int(share * begin)
        data[place : place + len(written)] = written
    path = intact.with_name("damaged.gguf")
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):  # any other exception fails the test
        assert open_gguf(path).config.parameters == open_gguf(intact).config.parameters
