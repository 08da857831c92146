"""Meta's params.json: the sizes that it states or leaves out, and what is refused."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_service.model.config import ModelConfig, RopeScaling
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.files.meta.params import read_params


@pytest.mark.parametrize(
    ("params", "hidden_dim"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),  # 7B
        ({"dim": 5120, "multiple_of": 256}, 13824),  # 13B
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),  # 70B
    ],
)
def test_hidden_dimension_is_that_of_metas_models(
    params: dict[str, float], hidden_dim: int
) -> None:
    assert ModelConfig(**params).hidden_dim == hidden_dim  # type: ignore[arg-type]


def test_params_of_llama_3_are_understood(tmp_path: Path) -> None:
    llama_3 = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
    }
    path = tmp_path / "params.json"
    path.write_text(json.dumps(llama_3))
    config = read_params(path)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, None)
    assert (config.hidden_dim, config.trained_context_length) == (14336, 8192)
    assert config.parameters == 8_030_261_248
    path.write_text(json.dumps(llama_3 | {"use_scaled_rope": True}))
    config = read_params(path)
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.trained_context_length == 131072


def test_params_may_state_sizes_that_metas_code_derives(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    scaling = {"kind": "linear", "factor": 4}
    stated = {"head_dim": 48, "hidden_dim": 1000, "trained_context_length": 16384}
    path.write_text(json.dumps({"dim": 100, "n_heads": 3, "rope_scaling": scaling} | stated))
    config = read_params(path)
    assert config.rope_scaling == RopeScaling("linear", 4)
    assert {name: getattr(config, name) for name in stated} == stated
    assert config.parameter_shapes()["layers.0.attention.wo.weight"] == (100, 144)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ({"n_experts": 8}, "Llama does not know: n_experts"),
        ({"tied_embeddings": True}, "Llama does not know: tied_embeddings"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5, not a number from 1 to 1e+12"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, not true or false"),
        ({"rope_scaling": 8}, "rope_scaling is 8, not an object"),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling lacks kind"),
        ({"rope_scaling": {"kind": "yarn"}}, "rope_scaling lacks factor"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 8}},
            "rope_scaling has kind 'yarn', not linear or llama3",
        ),
        (
            {"rope_scaling": {"kind": "llama3", "factor": 8, "low_freq_factor": 4}},
            "has low_freq_factor 4, not a number below its high_freq_factor 4",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has the unknown field 'type'"),
        ({"head_dim": 15}, "do not divide into heads of even size"),
        ({"dim": 0}, "dim is 0, not an integer from 1 to 1048576"),
        ({"dim": True}, "dim is True, not an integer"),
        ({"n_heads": "many"}, "n_heads is 'many', not an integer"),
        ({"n_layers": 2.0}, "n_layers is 2.0, not an integer"),
        ({"n_layers": 10_000_000}, "n_layers is 10000000, not an integer from 1 to 1048576"),
        ({"n_layers": 1_000_000}, "holds 2 layers, params.json states n_layers 1000000"),
        ({"norm_eps": math.inf}, "norm_eps is inf, not a number above 0 and at most 0.1"),
        ({"norm_eps": math.nan}, "norm_eps is nan, not a number"),
        ({"ffn_dim_multiplier": -1.3}, "ffn_dim_multiplier is -1.3, not a number above 0"),
        ({"quantization": ["int8"]}, "quantization is ['int8'], not none or int8"),
        ("[" * 100_000, "is not JSON"),
        ({"n_heads": 3}, "do not divide into heads"),
        ({"n_layers": 3}, "holds 2 layers, params.json states n_layers 3"),
        ({"vocab_size": 561}, "tok_embeddings.weight is 560 × 64"),
    ],
)
def test_wrong_params_name_file_and_setting(
    checkpoint: Callable[[str], Path], params: str | dict[str, object], problem: str
) -> None:
    folder = checkpoint("mha-mp1")
    path = folder / "params.json"
    if isinstance(params, dict):
        params = json.dumps(json.loads(path.read_text()) | params)
    path.write_text(params)
    with pytest.raises(CheckpointError, match="To fix: ") as error:
        open_checkpoint(folder)
    assert problem in str(error.value)


@given(
    name=st.sampled_from([field.name for field in dataclasses.fields(ModelConfig)]),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -1, 2**20, 1e-300, 64, "int8", [], {}])
    | st.text(max_size=3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_setting_is_served_as_it_is_or_refused(
    golden: Path, tmp_path: Path, name: str, value: object
) -> None:
    source = golden / "checkpoints" / "mha-mp1"
    params = json.loads((source / "params.json").read_text()) | {name: value}
    (tmp_path / "params.json").write_text(json.dumps(params))
    if not (tmp_path / "consolidated.00.pth").exists():
        (tmp_path / "consolidated.00.pth").symlink_to(source / "consolidated.00.pth")
    try:
        config = read_params(tmp_path / "params.json")
    except CheckpointError:
        return
    assert 0 < config.norm_eps <= 0.1
    with contextlib.suppress(CheckpointError):
        served = open_checkpoint(tmp_path, verify=False).config.parameter_shapes()
        assert served == open_checkpoint(source, verify=False).config.parameter_shapes()
