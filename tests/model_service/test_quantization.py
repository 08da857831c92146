import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.quantization import FORMATS, GROUP_SIZE
from model_service.model.weights.source import Shard
from model_service.offline.quantize import quantize_checkpoint
from serving.errors import StartError
from tests.model_service.conftest import golden_for

# Largest error of a weight, in units of the largest weight of what shares its scale.
STEP = {"int8": 0.5 / 127, "int4": 0.5 * 2 / 15, "fp8": 0.5 * 32 / 448}


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.integers(1, 6)), GROUP_SIZE * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = torch.randn(shape[0], 1, generator=generator).exp()
    weight = torch.randn(shape, generator=generator) * spread
    if draw(st.booleans()):
        weight[draw(st.integers(0, shape[0] - 1))] = draw(st.sampled_from([0.0, 0.25]))
    return weight


@pytest.mark.parametrize("name", FORMATS)
@given(weight=weights())
def test_weights_change_by_half_a_step_at_most(name: Any, weight: torch.Tensor) -> None:
    restored = FORMATS[name].quantize(weight).narrow(0, 0, len(weight))
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert ((restored - weight).abs() <= STEP[name] * largest * 1.001).all()


@pytest.mark.parametrize("name", FORMATS)
@given(weight=weights())
def test_quantizing_again_changes_nothing(name: Any, weight: torch.Tensor) -> None:
    once = FORMATS[name].quantize(weight)
    twice = FORMATS[name].quantize(once.narrow(0, 0, len(weight)))
    assert torch.equal(once.codes, twice.codes)


@pytest.mark.parametrize("name", FORMATS)
@given(weight=weights(), data=st.data())
def test_narrow_is_a_part_of_the_whole(name: Any, weight: torch.Tensor, data: Any) -> None:
    stored = FORMATS[name].quantize(weight)
    dimension = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, weight.shape[dimension] - 1))
    length = data.draw(st.integers(1, weight.shape[dimension] - start))
    whole = stored.narrow(0, 0, len(weight))
    assert torch.equal(
        stored.narrow(dimension, start, length), whole.narrow(dimension, start, length)
    )


@pytest.mark.kernels
@pytest.mark.parametrize("quantization", FORMATS)
def test_quantized_checkpoint_answers_as_the_original_quantized_at_load(
    quantization: Any,
    golden: Path,
    tmp_path: Path,
    make_engine: Any,
    cases: Any,
    request_for: Any,
    run: Any,
) -> None:
    name = golden_for(quantization)
    quantize_checkpoint(golden / "checkpoints" / name, tmp_path / "quantized", quantization)
    requests = [request_for(case) for case in cases(name.partition("-")[0])[:6]]
    stored = run(make_engine("quantized", tmp_path), requests)
    at_load = run(make_engine(name, quantize=quantization), requests)
    for key, answer in stored.items():
        assert answer.ids == at_load[key].ids
        assert answer.logprobs == pytest.approx(at_load[key].logprobs, abs=1e-3)
    assert stored != run(make_engine(name), requests)


@pytest.mark.parametrize("quantization", FORMATS)
def test_files_of_a_quantized_checkpoint_are_joined(
    quantization: Any, golden: Path, tmp_path: Path
) -> None:
    # Rows of int4 have to be whole in each file.
    source = golden / "checkpoints" / ("mha-mp1" if quantization == "int4" else "mha-mp2")
    quantize_checkpoint(source, tmp_path, quantization)
    cpu = torch.device("cpu")
    original = dict(open_checkpoint(source).read_shard(Shard(0, 1, torch.float32, cpu)))
    for name, weight in open_checkpoint(tmp_path).read_shard(Shard(0, 1, torch.float32, cpu)):
        error = (weight - original[name]).norm() / original[name].norm()
        assert error < {"int8": 0.01, "int4": 0.12, "fp8": 0.04}[quantization]


@pytest.mark.parametrize("quantization", FORMATS)
def test_stored_form_is_smaller_and_named_in_params(
    quantization: Any, golden: Path, tmp_path: Path
) -> None:
    source = golden / "checkpoints" / golden_for(quantization)
    quantize_checkpoint(source, tmp_path, quantization)
    params = json.loads((tmp_path / "params.json").read_text())
    assert params["quantization"] == quantization
    name = "consolidated.00.pth"
    assert (tmp_path / name).stat().st_size < 0.6 * (source / name).stat().st_size


def test_parts_of_a_weight_in_16_bits_that_a_quantized_one_takes() -> None:
    weight = torch.randn(64, 4096)
    taken = {}
    for name, kind in FORMATS.items():
        stored = kind.quantize(weight).stored("w").values()
        taken[name] = sum(each.nbytes for each in stored) / weight.bfloat16().nbytes
    assert taken == pytest.approx({"int8": 1 / 2, "fp8": 1 / 2, "int4": 5 / 16}, rel=1e-3)


def test_quantized_checkpoint_is_not_quantized_again(golden: Path, tmp_path: Path) -> None:
    quantize_checkpoint(golden / "checkpoints" / "gqa-mp1", tmp_path / "once", "int8")
    with pytest.raises(StartError, match="is quantized already, to int8"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", "int4")


def test_folder_in_use_is_left_alone(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(StartError, match="is not an empty folder"):
        quantize_checkpoint(golden / "checkpoints" / "gqa-mp1", tmp_path, "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_unknown_quantization_in_params_is_refused(checkpoint: Any, make_engine: Any) -> None:
    folder = checkpoint("gqa-mp1")
    params = json.loads((folder / "params.json").read_text()) | {"quantization": "int2"}
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(StartError, match="quantization is 'int2'"):
        make_engine("gqa-mp1", folder.parent)
