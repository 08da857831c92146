"""Baselines: rounds, the check for the same function, exports, and a comparison for real."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.baselines.__main__ import main
from bench.baselines.comparison import (
    ANSWER_TOKENS,
    Case,
    parse_case,
    rate_rows,
    same_function,
    schedule,
)
from bench.baselines.contenders import CONTENDERS, REFERENCE, default_names
from bench.baselines.environments import RECIPES, WITHOUT, UnavailableError, prepare
from bench.baselines.exports import (
    ensure_model,
    export_gguf,
    export_hf,
    model_bytes,
)
from bench.engine.driver import Job, loaded
from bench.engine.roofline import Work
from bench.report import read_host
from bench.shapes import SHAPES
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.source import Shard

NAMES = st.lists(st.text("abc", min_size=1), min_size=1, max_size=6, unique=True)
CASES = st.lists(
    st.builds(Case, st.sampled_from(["prefill", "decode"]), st.integers(1, 512)),
    min_size=1,
    max_size=3,
    unique=True,
)
NARROW = dataclasses.replace(read_host(), features=("avx2",))
WIDE = dataclasses.replace(NARROW, features=("avx512", "bf16"))
HEADS, HEAD_DIM, DIM = 4, 8, 16


def test_comparison_measures_who_can_run_and_names_who_cannot(
    tmp_path: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without a compiler
    small = ["--shapes", "tiny", "--rounds", "2", "--context", "8", "--steps", "2"]
    cases = ["--cases", "prefill-32", "decode-2", "--memory", "4"]
    folders = ["--work_dir", str(work_dir), "--results", str(tmp_path)]
    main([*small, *cases, *folders, "--contenders", REFERENCE, "llama.cpp-float32"])
    (file,) = tmp_path.glob("*/baselines/tiny/result.json")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    absent, same = rows[:2]
    assert absent["settings"] == {"contender": "llama.cpp-float32"}
    assert absent["values"]["reason"] == "building it needs cmake and g++"
    assert same["values"]["same"] is True
    rates = {row["case"]: row["values"] for row in rows if "rounds" in row["values"]}
    assert rates.keys() == {"prefill-32", "decode-2"}
    assert all(each["rounds"] == 2 and each["over_chasqui"] == 1 for each in rates.values())
    assert rates["decode-2"]["share_of_read_bandwidth"] > 0


def test_default_contenders_suit_the_processor() -> None:
    narrow = default_names(NARROW)
    assert "transformers-float32" in narrow
    assert "transformers-bfloat16" not in narrow
    wide = default_names(WIDE)
    assert {"chasqui-bfloat16", "vllm-eager-bfloat16", "llama.cpp-q8_0"} <= set(wide)


def test_bfloat16_needs_the_hardware() -> None:
    CONTENDERS["chasqui-bfloat16"].check(WIDE)
    with pytest.raises(UnavailableError, match="bfloat16"):
        CONTENDERS["chasqui-bfloat16"].check(NARROW)
    with pytest.raises(UnavailableError, match="built for the CPU"):
        CONTENDERS["llama.cpp-q8_0"].check(dataclasses.replace(WIDE, device="NVIDIA H200"))


def test_zentorch_needs_a_processor_that_vllm_uses_it_on() -> None:
    zentorch = CONTENDERS["vllm-zentorch-bfloat16"]
    zentorch.check(dataclasses.replace(WIDE, processor="AMD EPYC 9B45"))
    with pytest.raises(UnavailableError, match="AMD's processors with AVX-512"):
        zentorch.check(dataclasses.replace(WIDE, processor="Intel(R) Xeon(R) Processor"))


def test_bytes_of_decode_steps_grow_with_the_context() -> None:
    network = Job(SHAPES["7B"], "bfloat16", torch.device("cpu")).network
    cached = 2 * network.bytes(Work.decode([34, 34]))
    assert Case("decode", 2).bytes(network, 32, 3) == pytest.approx(1.5 * cached)


def test_improbable_token_shows_another_function() -> None:
    good = [0.0] * ANSWER_TOKENS
    assert same_function("other", "float32", good)
    assert same_function("other", "float32", [*good[1:], 0.5]) is False
    assert same_function("other", "Q4_0", [*good[1:], 0.5]) is None
    with pytest.raises(ValueError, match="answered 1 tokens"):
        same_function("other", "float32", [0.0])


@given(NAMES, CASES, st.integers(1, 4), st.integers())
def test_each_round_asks_every_contender_every_case_once(
    names: list[str], cases: list[Case], rounds: int, seed: int
) -> None:
    turns = list(schedule(names, cases, rounds, seed))
    for number in range(rounds):
        asked = [(turn.case, turn.contender) for turn in turns if turn.round == number]
        assert sorted(asked, key=str) == sorted(itertools.product(cases, names), key=str)
    assert [turn.round for turn in turns] == sorted(turn.round for turn in turns)
    # Contenders of a round and case get the same prompts.
    seeds = {(turn.round, turn.case, turn.seed) for turn in turns}
    assert len(seeds) == rounds * len(cases)


def test_order_of_contenders_changes_from_round_to_round() -> None:
    turns = list(schedule("abcdefgh", [Case("decode", 1)], 4, seed=1))
    orders = {tuple(t.contender for t in turns if t.round == number) for number in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("name", ["decode", "decode-0", "decode-x", "train-1", ""])
def test_unknown_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name a case as"):
        parse_case(name)


def test_rate_counts_all_sequences_of_a_step() -> None:
    assert parse_case("prefill-512").rate([2.0]) == 256
    assert parse_case("decode-8").rate([0.5, 1.5]) == 8


def test_ratio_is_of_medians_and_missing_without_reference() -> None:
    ours, other = "chasqui-int8", "llama.cpp-q8_0"
    rates = {("decode-1", ours): [1.0, 2.0, 30.0], ("decode-1", other): [8.0, 6.0, 9.0]}
    found = list(rate_rows(rates, {("decode-1", ours): [0.5, 0.9, 0.8]}))
    assert [row.values["over_chasqui"] for row in found] == [1.0, 4.0]
    assert [row.values["tokens_per_s_high"] for row in found] == [30.0, 9.0]
    assert [row.values.get("share_of_read_bandwidth") for row in found] == [0.8, None]
    (alone,) = rate_rows({("decode-1", other): [8.0]}, {})
    assert alone.values["over_chasqui"] is None


def test_every_baseline_has_an_environment_with_exact_versions() -> None:
    assert {each.engine for each in CONTENDERS.values()} - {"chasqui"} == RECIPES.keys()
    assert all("==" in package for each in RECIPES.values() for package in each.packages)


def test_compiled_baselines_are_held_from_what_chasqui_is_held_from() -> None:
    native = RECIPES["llama_cpp"]
    assert native.without(()) is native
    held = native.without(("bf16", "amx"))
    assert held.build["CXXFLAGS"] == held.build["CFLAGS"] == f"{WITHOUT['bf16']} {WITHOUT['amx']}"
    assert held.packages == native.packages
    assert held.build["CMAKE_ARGS"] == native.build["CMAKE_ARGS"]
    assert RECIPES["vllm"].without(("amx",)) is RECIPES["vllm"]


def test_baseline_that_cannot_be_built_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"building it needs cmake and g\+\+"):
        prepare("llama_cpp", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def weights(tiny: Path) -> dict[str, torch.Tensor]:
    """The checkpoint, by Meta's names."""
    return dict(open_checkpoint(tiny).read_shard(Shard(0, 1, torch.float32, torch.device("cpu"))))


@pytest.fixture(scope="module")
def hf_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in Hugging Face's format."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("exports") / "hf"
    export_hf(tiny, folder)
    return folder


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0.0), ("Q8_0", 0.02), ("Q4_0", 0.3)])
def test_gguf_holds_the_checkpoints_numbers(
    tiny: Path, tmp_path: Path, weights: dict[str, torch.Tensor], kind: str, tolerance: float
) -> None:
    gguf = pytest.importorskip("gguf")
    export_gguf(tiny, tmp_path / "model.gguf", kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(weights)
    found = tensors["blk.1.attn_q.weight"]
    values = torch.tensor(gguf.dequantize(found.data, found.tensor_type))
    expected = weights["layers.1.attention.wq.weight"].float()
    atol = tolerance * float(expected.abs().max())
    torch.testing.assert_close(values, expected, rtol=0, atol=atol)


def test_hugging_face_files_hold_the_checkpoints_numbers(
    hf_folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    found = safetensors.load_file(hf_folder / "model.safetensors")
    assert len(found) == len(weights)
    expected = weights["layers.0.feed_forward.w3.weight"]
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], expected)
    assert json.loads((hf_folder / "config.json").read_text())["intermediate_size"] == 384
    assert model_bytes(hf_folder) > 2 * SHAPES["tiny"].parameters


def test_transformers_continues_as_the_engine(hf_folder: Path, job: Job) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    prompt = (300, 400, 500, 301, 402)
    ids: tuple[int, ...] = prompt
    for _ in range(8):
        ids = (*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    with loaded(job) as driver:
        assert max(driver.shortfalls(prompt, ids[len(prompt) :])) < 1e-4


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="export to F32 failed"):
        ensure_model("F32", tmp_path / "no-checkpoint", tmp_path)
    assert not list((tmp_path / "exports" / "no-checkpoint").iterdir())
