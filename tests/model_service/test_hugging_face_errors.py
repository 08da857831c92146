"""Folders that cannot be served name the file, the problem and the fix."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model_service.model.errors import CheckpointError
from model_service.model.operations import rotary_frequencies
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.source import Shard
from tests.model_service.hugging_face_models import Variant, save_model

WQ = "model.layers.0.self_attn.q_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ABSENT = object()
Copy = Callable[[], Path]


def copier(folder: Path, target: Path) -> Copy:
    def copy() -> Path:
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    return copy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders, with one file of weights and with several."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder / "one", Variant())
    save_model(folder / "several", Variant(file_size="100KB"))
    return {name: folder / name for name in ("one", "several")}


@pytest.fixture
def one(saved: dict[str, Path], tmp_path: Path) -> Path:
    return copier(saved["one"], tmp_path)()


@pytest.fixture
def several(saved: dict[str, Path], tmp_path: Path) -> Path:
    return copier(saved["several"], tmp_path)()


def refusal(folder: Path) -> str:
    """The error's text, in which the folder is `~`."""
    with pytest.raises(CheckpointError) as error:
        open_weights(folder)
    return str(error.value).replace(str(folder), "~")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "qwen2"}, "has model_type 'qwen2'; LlamaForCausalLM and MistralForCausal"),
        ({"model_type": ["llama"]}, "has model_type ['llama']; LlamaForCausalLM and"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "has architectures ['LlamaForSequenceClassification']; LlamaForCausalLM and Mistral",
        ),
        (
            {"model_type": "mistral", "architectures": None, "sliding_window": 4096},
            "has sliding_window 4096, but here every token attends to all before it",
        ),
        ({"model_type": "mistral", "architectures": None}, "has sliding_window 4096"),
        ({"attention_bias": True}, "has attention_bias true, but linear layers have no bias here"),
        ({"mlp_bias": True}, "has mlp_bias true"),
        ({"mlp_bias": "no"}, "mlp_bias is 'no', not true or false"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'; silu is supported"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "has a quantization_config (gptq), but weights in float32, bfloat16 or float16",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters of the type"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "has rope_scaling of the type 'dynamic'; default, linear and llama3 are supported",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "of the type 'longrope'"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "of the type ['linear']"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters lacks factor"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 0.5}},
            "rope_parameters has factor 0.5, not a number from 1 to 1024",
        ),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big', not a number from 1"),
        ({"rope_parameters": 5}, "rope_parameters is 5, not an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5"),
        ({"vocab_size": -1}, "vocab_size is -1, not an integer from 1"),
        ({"hidden_size": ABSENT}, "lacks hidden_size"),
        ({"head_dim": None, "hidden_size": 130}, "hidden_size 130 is no multiple of num_attention"),
        ({"head_dim": 15}, "head_dim 15 is odd, but its features rotate in pairs"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads"),
    ],
)
def test_unsupported_settings_are_named(one: Path, changes: dict[str, Any], problem: str) -> None:
    path = one / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in settings.items() if v is not ABSENT}))
    told = refusal(one)
    assert told.startswith("~/config.json: ")
    assert problem in told
    assert ". To fix: " in told


SETTINGS = [
    "architectures", "attention_bias", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "max_position_embeddings", "mlp_bias", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "partial_rotary_factor",
    "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "vocab_size",
]  # fmt: skip
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -1, 0, 2**20, 1e-300, 64, 128, "linear", [], {}, [[]], "Llama"]),
    st.text(max_size=3),
)
OBJECTS = st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", "factor", "low_freq_factor"]),
    VALUES | st.sampled_from(["llama3", "linear", "default", 2.0]),
)


@given(name=st.sampled_from(SETTINGS), value=VALUES | OBJECTS)
def test_any_setting_is_served_as_it_is_or_refused(
    saved: dict[str, Path], name: str, value: object
) -> None:
    source = saved["one"]
    settings = json.loads((source / "config.json").read_text()) | {name: value}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").symlink_to(source / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        with contextlib.suppress(CheckpointError):
            served = open_weights(Path(folder)).config
            assert served.parameter_shapes() == open_weights(source).config.parameter_shapes()
            rotary = rotary_frequencies(served.head_dim, 4, served.rope_theta, served.rope_scaling)
            assert torch.view_as_real(rotary).isfinite().all()


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(WQ), f"~: lacks {WQ}. To fix: use the config.json that came with"),
        (
            lambda t: t.pop("lm_head.weight"),
            "~: lacks lm_head.weight. To fix: set tie_word_embeddings to true in config.json if",
        ),
        (
            lambda t: t.update({"model.adapter.weight": torch.ones(1)}),
            f"~/{SINGLE}: also holds model.adapter.weight. To fix: ",
        ),
        (
            lambda t: t.update({WQ: torch.ones(64, 128)}),
            f"~/{SINGLE}: {WQ} is 64 × 128; config.json makes it 128 × 128. To fix: ",
        ),
        (
            lambda t: t.update({WQ: torch.tensor(1.0)}),
            f"~/{SINGLE}: {WQ} is a single number; config.json makes it 128 × 128",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}),
            f"~/{SINGLE}: holds model.layers.0.self_attn.q_proj.bias, but linear layers have no",
        ),
        (
            lambda t: t.update({f"{WQ.removesuffix('weight')}qweight": torch.ones(2).int()}),
            f"~/{SINGLE}: model.layers.0.self_attn.q_proj.qweight is int32, of a quantized layer",
        ),
        (
            lambda t: t.update({WQ: t[WQ].to(torch.float8_e4m3fn)}),
            f"~/{SINGLE}: {WQ} is float8_e4m3fn, of a quantized layer; float32, bfloat16 and",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
            "~: holds 3 layers, config.json states num_hidden_layers 2. To fix: ",
        ),
    ],
)
def test_unsupported_tensors_are_named(
    one: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    edit(one / SINGLE, change)
    assert refusal(one).startswith(told)


def test_a_number_of_layers_is_not_believed(one: Path) -> None:
    path = one / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1_000_000}))
    assert "holds 2 layers, config.json states num_hidden_layers 1000000" in refusal(one)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_weights_that_are_not_finite_are_refused(one: Path, value: float) -> None:
    edit(one / SINGLE, lambda tensors: tensors[WQ][3, 5].fill_(value))
    with pytest.raises(CheckpointError, match=f"{WQ} holds NaN, or .* infinite in float16"):
        list(open_weights(one).read_shard(Shard(0, 2, torch.float16, torch.device("cpu"))))


def test_a_stored_output_must_be_the_embedding_if_they_are_tied(one: Path) -> None:
    path = one / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert refusal(one) == (
        f"~/{SINGLE}: lm_head.weight is not model.embed_tokens.weight, though config.json has "
        "tie_word_embeddings true. To fix: set tie_word_embeddings to false in config.json."
    )


def test_damaged_files_are_named(one: Path) -> None:
    path = one / SINGLE
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        assert refusal(one).startswith(f"~/{SINGLE}: is cut short, damaged, or no safetensors file")


def places(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_file_that_the_index_names_must_be_there(several: Path) -> None:
    file = json.loads((several / INDEX).read_text())["weight_map"][WQ]
    (several / file).unlink()
    assert refusal(several) == (
        f"~/{file}: not found, and {INDEX} names it (1 of 12 missing). To fix: download the "
        "missing files."
    )


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", 7])
def test_the_index_may_only_name_files_of_its_folder(several: Path, file: Any) -> None:
    places(several, lambda weight_map: weight_map.update({WQ: file}))
    assert refusal(several).startswith(
        f"~/{INDEX}: places {WQ} in {str(file)!r}, which is not the name of a "
    )


def test_the_index_must_agree_with_the_files(several: Path) -> None:
    index = (several / INDEX).read_text()
    own = json.loads(index)["weight_map"][WQ]
    other = json.loads(index)["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    places(several, lambda weight_map: weight_map.update({WQ: other}))
    assert f"~/{own}: holds {WQ}, which {INDEX} places in {other}" in refusal(several)
    places(several, lambda weight_map: weight_map.update({WQ: own, "more": own}))
    assert f"~/{own}: lacks more, which {INDEX} places there" in refusal(several)
    (several / INDEX).write_text(index.replace(f'"{WQ}": ', f'"{WQ}": "{own}", "{WQ}": '))
    assert refusal(several).startswith(f"~/{INDEX}: names {WQ} twice")
    for content, problem in (("{", "is not JSON"), ("{}", "has no weight_map with the file")):
        (several / INDEX).write_text(content)
        assert f"~/{INDEX}: {problem}" in refusal(several)


def test_a_tensor_in_two_files_is_refused(several: Path) -> None:
    index = json.loads((several / INDEX).read_text())["weight_map"]
    first, last = sorted({*index.values()})[:: len({*index.values()}) - 1]
    name = "model.rotary"  # which the index does not list
    for file in (first, last):
        edit(several / file, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert refusal(several).startswith(f"~/{last}: holds {name}, like {first}")


def test_missing_files_say_what_to_download(several: Path) -> None:
    (several / INDEX).unlink()
    part = next(several.glob("model-*")).name
    assert refusal(several).startswith(f"~/{INDEX}: not found, though model-")
    for file in several.glob("model-*"):
        file.unlink()
    assert part not in refusal(several)
    assert refusal(several).startswith(f"~/{SINGLE}: not found, and neither is {INDEX}")
    (several / "pytorch_model-00001-of-00002.bin").touch()
    assert refusal(several).startswith(
        "~: holds its weights as pytorch_model-00001-of-00002.bin, which may run code when it is "
        "read. To fix: convert them once to safetensors: transformers.AutoModelForCausalLM"
    )


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("notes.txt", "~: holds no checkpoint. To fix: name a folder with Meta's params.json"),
        ("pytorch_model.bin", "~: holds its weights as pytorch_model.bin, which may run code"),
        ("adapter_config.json", "~: holds an adapter, not a model. To fix: merge it"),
        ("model.safetensors", "~/config.json: not found. To fix: download it, too."),
        ("params.json", "~/params.json: is not JSON"),
        ("consolidated.00.pth", "~/params.json: not found"),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_is_accepted(
    tmp_path: Path, file: str, problem: str
) -> None:
    assert refusal(tmp_path / "nowhere").startswith("~: not found. To fix: name a folder with Meta")
    (tmp_path / file).touch()
    assert refusal(tmp_path).startswith(problem)
    assert refusal(tmp_path / file).startswith("~: is a file of a kind that is not read. To fix: ")
