"""GGUF files give the answers that transformers gives with them."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType

from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.config import RopeScaling
from model_service.model.cuda import pinned_transfer
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.weights.conversion.write_meta import write_meta
from model_service.model.weights.files import read_parts
from model_service.model.weights.files.gguf.dequantize import dequantize
from model_service.model.weights.files.gguf.gguf_file import GgufFile, open_gguf
from model_service.model.weights.files.gguf.tensors import WorkerPool
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.partition import shard_parameters, split_dimension
from model_service.model.weights.source import Shard
from tests.model_service.gguf_models import (
    METADATA,
    QUANTIZED_BY_PACKAGE,
    SCALES,
    converted,
    loaded_by_transformers,
    make_model,
    write_gguf,
)
from tests.model_service.hugging_face_models import (
    LENGTH,
    LLAMA_3,
    PROMPTS,
    check_greedy_answers,
    greedy,
)

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
TYPES = (*QUANTIZED_BY_PACKAGE, *SCALES)
SCALING = LLAMA_3 | {"original_max_position_embeddings": 8192}


def weights(source: GgufFile, rank: int = 0, shards: int = 1) -> dict[str, torch.Tensor]:
    return dict(source.read_shard(Shard(rank, shards, torch.float32, CPU)))


def llama_3_divisors() -> Any:
    """`rope_freqs.weight` as `LlamaModel.generate_extra_tensors` of convert_hf_to_gguf.py."""
    divisors = []
    for frequency in 1.0 / (10000.0 ** (np.arange(0, 32, 2) / 32)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(divisors, np.float32), GGMLQuantizationType.F32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files of all types and shapes, and transformers' answers with them."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model()
    answers = {}
    for name in TYPES:
        path = write_gguf(folder / f"{name}.gguf", converted(model, name))
        answers[str(path)] = greedy(loaded_by_transformers(path), PROMPTS, LENGTH)
    # The network itself, converted as llama.cpp does it: without transformers' way back.
    answers[str(folder / "F32.gguf")] = greedy(model, PROMPTS, LENGTH)

    tied = converted(model, "Q8_0", tied=True)
    path = write_gguf(folder / "tied.gguf", tied)
    answers[str(path)] = greedy(loaded_by_transformers(path), PROMPTS, LENGTH)

    scaled = converted(model, "F16") | {"rope_freqs.weight": llama_3_divisors()}
    path = write_gguf(folder / "llama3.gguf", scaled)
    scaled_model = make_model(rope_parameters=SCALING)
    scaled_model.load_state_dict(loaded_by_transformers(folder / "F16.gguf").state_dict())
    answers[str(path)] = greedy(scaled_model, PROMPTS, LENGTH)

    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(folder / "linear.gguf", converted(model, "F32"), METADATA | linear)
    linear_model = make_model(rope_parameters={"rope_type": "linear", "factor": 4.0})
    answers[str(path)] = greedy(linear_model, PROMPTS, LENGTH)
    return answers


@pytest.mark.parametrize("shards", [1, 2])
def test_greedy_answers_are_those_of_transformers(models: dict[str, Any], shards: int) -> None:
    check_greedy_answers(models, shards)


def file_of(models: dict[str, Any], name: str) -> Path:
    return next(Path(path) for path in models if Path(path).stem == name)


@pytest.mark.parametrize("name", TYPES)
def test_shards_are_cuts_of_the_whole(models: dict[str, Any], name: str) -> None:
    source = open_gguf(file_of(models, name))
    parts = [weights(source, rank, 4) for rank in range(4)]
    for parameter, whole in weights(source).items():
        dimension = split_dimension(parameter)
        own = [part[parameter] for part in parts]
        joined = own[0] if dimension is None else torch.cat(own, dimension)
        assert torch.equal(joined, whole), parameter
    assert sum(part.numel() for part in parts[0].values()) == shard_parameters(source.config, 4)


@pytest.mark.parametrize("name", [*SCALES, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("rows", [1, 50])
def test_blocks_are_dequantized_bit_for_bit_as_by_the_package(name: str, rows: int) -> None:
    kind = GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    generator = np.random.default_rng(rows)
    # A part of rows, as a shard reads it: every pattern of bits but infinite scales and NaN.
    blocks = generator.integers(0, 256, (rows, 5 * size), dtype=np.uint8) & np.uint8(0xBF)
    blocks = blocks[:, size : 4 * size]
    expected = gguf.dequantize(np.ascontiguousarray(blocks).reshape(1, -1), kind).reshape(-1)
    assert np.array_equal(dequantize(blocks, kind).numpy().view(np.int32), expected.view(np.int32))


def test_threads_of_dequantization_leave_no_trace(models: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    weights(open_gguf(file_of(models, "Q4_0")))
    with ThreadPoolExecutor(1) as new:
        assert new.submit(torch.get_num_threads).result() == torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_are_put_together_in_order(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    source = open_gguf(file_of(models, "Q4_K"))
    whole = weights(source)
    monkeypatch.setattr(f"{type(source.tensors['norm.weight']).__module__}._PIECE", 1000)
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name, weight in weights(source).items():
        assert torch.equal(weight, whole[name]), name
    torch.set_num_threads(before)


@pytest.mark.parametrize("dimension", [0, 1])
def test_pieces_pass_through_the_buffers_of_a_device(
    models: dict[str, Any], dimension: int
) -> None:
    stored = open_gguf(file_of(models, "Q5_K")).tensors["layers.0.feed_forward.w2.weight"]
    rows, columns = (100, 512) if dimension == 0 else (256, 100)
    direct, staged = torch.empty(rows, columns), torch.empty(rows, columns)
    with WorkerPool() as pool:
        stored.copy_part(dimension, 150, direct, WeightUpload(CPU), pool)
        stored.copy_part(dimension, 150, staged, WeightUpload(CPU, 4096), pool)
    assert torch.equal(staged, direct)


def test_host_holds_some_pieces_and_never_the_weights(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 300_000  # 82 MB, dequantized 307 MB
    tensors = {
        tensor.name: (tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(file_of(models, "tied")).tensors
    }
    codes = np.zeros((rows, 256 // 32 * 34), np.uint8)
    tensors["token_embd.weight"] = codes, GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "large.gguf", tensors, METADATA | {"llama.vocab_size": rows})
    del codes, tensors
    monkeypatch.setattr(pinned_transfer, "BUFFER_BYTES", 2**22)
    # The device meta has no numbers to look at.
    monkeypatch.setattr(read_parts, "extremes", lambda _: torch.zeros(2))
    source = open_gguf(path)
    process = psutil.Process()

    def own() -> int:  # without the pages of mapped files
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before = own()
    device = torch.device("meta")
    held = max(own() - before for _ in source.read_shard(Shard(0, 1, torch.float16, device)))
    assert held < 50e6


def test_a_converted_file_holds_the_same_numbers(models: dict[str, Any], tmp_path: Path) -> None:
    source = open_gguf(file_of(models, "Q6_K"))
    write_meta(source, tmp_path / "meta")
    converted_weights = dict(
        open_weights(tmp_path / "meta").read_shard(Shard(0, 1, torch.float32, CPU))
    )
    for name, weight in weights(source).items():
        assert torch.equal(converted_weights[name], weight), name


def test_weights_are_read_in_another_type(models: dict[str, Any]) -> None:
    source = open_gguf(file_of(models, "Q6_K"))
    wide = weights(source)
    for name, weight in source.read_shard(Shard(0, 1, torch.bfloat16, CPU)):
        assert torch.equal(weight, wide[name].bfloat16()), name


def test_config_is_what_the_metadata_states(models: dict[str, Any]) -> None:
    config = open_gguf(file_of(models, "llama3")).config
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (config.norm_eps, config.trained_context_length, config.head_dim) == (1e-6, 256, 32)
    linear = open_gguf(file_of(models, "linear")).config.rope_scaling
    assert linear is not None
    assert (linear.kind, linear.factor) == ("linear", 4.0)


def test_a_tied_matrix_is_one_parameter(models: dict[str, Any]) -> None:
    tied, plain = (open_gguf(file_of(models, name)) for name in ("tied", "Q8_0"))
    assert plain.config.parameters - tied.config.parameters == 128 * 256
    read = weights(tied)
    assert torch.equal(read["output.weight"], read["tok_embeddings.weight"])


def test_a_file_of_version_2_is_read_like_one_of_version_3(
    models: dict[str, Any], tmp_path: Path
) -> None:
    data = bytearray(file_of(models, "Q8_0").read_bytes())
    data[4] = 2
    (tmp_path / "old.gguf").write_bytes(data)
    old, new = open_gguf(tmp_path / "old.gguf"), open_gguf(file_of(models, "Q8_0"))
    assert old.fingerprint() == new.fingerprint()


def test_fingerprint_tells_weights_and_types_apart(models: dict[str, Any], tmp_path: Path) -> None:
    path = file_of(models, "Q4_0")
    data = bytearray(path.read_bytes())
    data[-33] ^= 1  # in the last tensor, before the padding
    (tmp_path / "other.gguf").write_bytes(data)
    opened = [open_gguf(each) for each in (path, tmp_path / "other.gguf")]
    assert opened[0].fingerprint() != opened[1].fingerprint()
    assert open_gguf(path).fingerprint() == opened[0].fingerprint()
    # The blocks of this type have the same size.
    retyped = dataclasses.replace(
        opened[0].tensors["output.weight"], type=GGMLQuantizationType.IQ4_NL
    )
    others = {**opened[0].tensors, "output.weight": retyped}
    assert dataclasses.replace(opened[0], tensors=others).fingerprint() != opened[0].fingerprint()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantize_works_on_the_dequantized_weights(
    models: dict[str, Any], run: Any, tmp_path: Path, quantize: Any
) -> None:
    path = file_of(models, "Q4_K")
    plain = {
        tensor.name: (gguf.dequantize(tensor.data, tensor.tensor_type), GGMLQuantizationType.F32)
        for tensor in gguf.GGUFReader(path).tensors
    }
    answers = []
    for source in (path, write_gguf(tmp_path / "plain.gguf", plain)):
        options = ReplicaOptions(source, 256, dtype="float32", device="cpu", quantize=quantize)
        engine = load_replica(options).engine()
        request = GenerationRequest("a", tuple(PROMPTS[1]), LENGTH, GREEDY, logprobs=True)
        answers.append(run(engine, [request])["a"])
    assert len(answers[0].ids) == LENGTH
    assert answers[0] == answers[1]
