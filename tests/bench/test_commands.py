"""The other commands, on real services, the demonstration checkpoint and the tiny shape."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import demonstration, service
from bench.baselines import loading
from bench.service import Answer, made_up_tokenizer, rates


def result(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("**/result.json")
    return dict(json.loads(file.read_text()))


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


def test_speculation_and_quantization_are_measured_on_the_demonstration(tmp_path: Path) -> None:
    sizes = ["--rounds", "1", "--dialogs", "2", "--streams", "2", "--formats", "float32"]
    demonstration.main([*sizes, "--results", str(tmp_path)])
    repeats, new, quantized = result(tmp_path)["rows"]
    assert repeats["values"]["accepted"] > 0
    assert new["settings"]["text"] == "new"
    assert 1.6 < float(quantized["values"]["perplexity"]) < 1.8
    assert quantized["values"]["held_out_answered"] > 60


def test_gpu_command_is_the_engines_and_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--shape", "tiny"]
    sizes = ["--sizes", "tiny", "--no-plots", "--seconds", "0", "--cases", "one_stream"]
    folders = ["--work_dir", str(tmp_path / "work"), "--results", str(tmp_path)]
    subprocess.run([*command, *sizes, *folders], check=True, timeout=120)
    assert "the time of this run was over" in result(tmp_path)["notes"][0]


def test_loading_is_compared_with_reading(tmp_path: Path, work_dir: Path) -> None:
    formats = ["meta", "hf", "Q8_0"]
    folders = ["--work_dir", str(work_dir), "--results", str(tmp_path)]
    loading.main(["--shape", "tiny", "--formats", *formats, "--rounds", "1", *folders])
    rows = result(tmp_path)["rows"]
    assert [row["settings"]["format"] for row in rows] == formats
    for row in rows:
        assert row["values"]["over_reading"] > 0
        assert row["values"]["peak_over_weights"] > 0
