"""The other commands, on real services, the demonstration checkpoint and the tiny shape."""

import itertools
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import demonstration, gateway, service
from bench.baselines import loading
from bench.gpu import check, first, kernels
from bench.service import Answer, made_up_tokenizer, rates


def result(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("**/result.json")
    return dict(json.loads(file.read_text()))


@pytest.mark.thorough
def test_services_are_compared_with_the_engine_and_put_under_load(
    tmp_path: Path, work_dir: Path
) -> None:
    sizes = ["--streams", "1", "3", "--prompt", "16", "--answer", "400", "--rounds", "1"]
    load = ["--shares", "0.5", "--load_seconds", "0.5", "--load_prompts=8", "--load_answers=8"]
    folders = ["--work_dir", str(work_dir), "--results", str(tmp_path)]
    small = ["--shape", "tiny", "--quantize", "none", "--calls", "text", "chat"]
    service.main([*small, *sizes, *load, *folders])
    rows = result(tmp_path)["rows"]
    asked = [(row["settings"].get("call"), row["settings"].get("streams")) for row in rows[:4]]
    assert asked == [("text", 1), ("text", 3), ("chat", 1), ("chat", 3)]
    assert all(row["values"]["ratio"] > 0 for row in rows[:4])
    assert [row["settings"]["load"] for row in rows[4:]] == ["capacity", "50%"]
    assert rows[-1]["values"]["failed"] == 0


def test_tokens_of_an_answer_are_spread_between_its_first_and_last() -> None:
    answers = [Answer(1.0, 3.0, 5), Answer(2.0, 4.0, 9)]
    assert rates(0.0, answers).decode == 2 + 4
    assert rates(0.0, answers).overall == 14 / 4
    with pytest.raises(RuntimeError, match="longer answers"):
        rates(0.0, [Answer(1.0, 2.0, 5), Answer(2.0, 4.0, 9)])


def test_made_up_pieces_fill_the_vocabulary() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=made_up_tokenizer(2000))
    assert tokenizer.vocab_size() == 2000
    assert tokenizer.id_to_piece(1999) == "▁made1999"


@pytest.mark.thorough
def test_speculation_and_quantization_are_measured_on_the_demonstration(tmp_path: Path) -> None:
    sizes = ["--rounds", "1", "--dialogs", "2", "--streams", "2", "--formats", "float32"]
    demonstration.main([*sizes, "--results", str(tmp_path)])
    repeats, new, quantized = result(tmp_path)["rows"]
    assert repeats["values"]["accepted"] > 0
    assert new["settings"]["text"] == "new"
    assert 1.6 < float(quantized["values"]["perplexity"]) < 1.8
    assert quantized["values"]["held_out_answered"] > 60


@pytest.mark.thorough
def test_the_gateways_cost_is_told_for_both_protocols(tmp_path: Path) -> None:
    sizes = ["--streams", "2", "--prompt", "4", "--answer", "8", "--requests", "4", "--rounds", "1"]
    gateway.main([*sizes, "--results", str(tmp_path)])
    latency, cost = result(tmp_path)["rows"]
    assert (latency["case"], cost["case"]) == ("gateway", "protocols")
    assert latency["values"]["tokens_per_message"] >= 1
    assert latency["values"]["first_token_direct_ms_p50"] > 0
    parts = {f"{protocol}_cpu_us_per_{part}" for protocol, part in PARTS_OF_COST}
    assert cost["values"].keys() == {*parts, "ratio_per_token", "ratio_per_request"}


PARTS_OF_COST = list(itertools.product(("grpc", "http"), ("token", "request")))


def test_the_cost_of_a_token_is_that_of_longer_answers() -> None:
    costs = {("grpc", 1): 12.0, ("grpc", 11): 32.0, ("http", 1): 14.0, ("http", 11): 54.0}
    told = gateway._per_token_and_request(costs, 11)
    assert [told[f"{protocol}_cpu_us_per_{part}"] for protocol, part in PARTS_OF_COST] == [
        *(2, 10),
        *(4, 10),
    ]
    assert (told["ratio_per_token"], told["ratio_per_request"]) == (2, 1)
    # Fewer than the clock's 10 ms look like none.
    assert (
        gateway._per_token_and_request({**costs, ("grpc", 11): 12.0}, 11)["ratio_per_token"] is None
    )


@pytest.mark.thorough
def test_what_the_host_needs_for_a_step_is_told_for_both_kinds_of_steps(
    tmp_path: Path, work_dir: Path
) -> None:
    command = [sys.executable, "-m", "bench.gpu", "host", "--device", "cpu", "--shape", "tiny"]
    folders = ["--work_dir", str(work_dir), "--results", str(tmp_path)]
    sizes = ["--sizes", "tiny", "--precisions", "float32"]
    subprocess.run([*command, *sizes, *folders], check=True, timeout=120)
    found = [row for row in result(tmp_path)["rows"] if row["case"] == "host"]
    assert [row["settings"]["prompt_tokens"] for row in found] == [False, True]
    assert all(0 < row["values"]["launch_ms"] <= row["values"]["step_ms"] for row in found)


@pytest.mark.thorough
def test_a_check_of_a_gpu_runs_its_tests_on_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    chosen = "(gqa-mp1-gqa-40 and lookahead) or seed or waits"
    with pytest.raises(SystemExit) as ended:
        check.main(["--device", "cpu", "-k", chosen])
    output = capfd.readouterr().out
    assert ended.value.code == 0, output
    assert "logprobs are off by at most" in output
    assert "3 passed" in output


def test_a_first_run_goes_on_after_a_part_that_fails_and_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sum(limit for _, limit, _ in first.PARTS) <= first.SECONDS
    parts = [("slow", 1, ("sleep", "60")), ("good", 5, ("echo", "a fact"))]
    monkeypatch.setattr(first, "PARTS", parts)
    with pytest.raises(SystemExit, match="True"):
        first.main(["--results", str(tmp_path)])
    assert "slow: status 124" in capfd.readouterr().out
    assert (tmp_path / "good.log").read_text() == "a fact\n"


def test_compiled_kernels_become_a_package_in_which_flashinfer_looks(tmp_path: Path) -> None:
    compiled = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib") / "libpython3.so"
    library = next(each for each in (compiled, Path(torch._C.__file__)) if each.exists())
    module = SimpleNamespace(get_library_path=lambda: library)
    kernels.write_package(tmp_path / "flashinfer_jit_cache", "0.6.18", {"norm": module})
    script = "import flashinfer_jit_cache as f; print(f.__version__, f.get_jit_cache_dir())"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == ["0.6.18", str(tmp_path / "flashinfer_jit_cache" / "jit_cache")]
    assert (Path(found[1]) / "norm" / "norm.so").exists()


@pytest.mark.thorough
def test_loading_is_compared_with_reading(tmp_path: Path, work_dir: Path) -> None:
    formats = ["Q8_0"]
    folders = ["--work_dir", str(work_dir), "--results", str(tmp_path)]
    loading.main(["--shape", "tiny", "--formats", *formats, "--rounds", "1", *folders])
    rows = result(tmp_path)["rows"]
    assert [row["settings"]["format"] for row in rows] == formats
    for row in rows:
        assert row["values"]["over_reading"] > 0
        assert row["values"]["peak_over_weights"] > 0
