from pathlib import Path

import pytest
import torch

from bench.checkpoint import ensure_checkpoint, random_weight
from bench.engine.session import Variant, session
from bench.shapes import SHAPES
from model_service.engine.sequence import GenerationRequest
from model_service.model.config import read_params
from model_service.model.weights.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    ("name", "hidden", "millions"),
    [
        ("110M", 2048, 134),
        ("1.1B", 5632, 1100),
        ("7B", 11008, 6738),
        ("13B", 13824, 13015),
        ("70B", 28672, 68976),
    ],
)
def test_shapes_have_their_sizes(name: str, hidden: int, millions: int) -> None:
    shape = SHAPES[name]
    assert shape.config.hidden_dim == hidden
    assert shape.parameters // 10**6 == millions


def test_checkpoint_describes_its_shape(tiny: Path) -> None:
    assert read_params(tiny / "params.json") == SHAPES["tiny"].config
    assert open_checkpoint(tiny).parameters == SHAPES["tiny"].parameters


def test_checkpoint_is_written_once(tiny: Path, work_dir: Path) -> None:
    file = tiny / "consolidated.00.pth"
    written = file.stat().st_mtime_ns
    assert ensure_checkpoint(SHAPES["tiny"], work_dir) == tiny
    assert file.stat().st_mtime_ns == written


def test_weights_depend_on_the_name_alone() -> None:
    config = SHAPES["tiny"].config
    first, again, other = (
        random_weight(f"layers.{layer}.attention.wv.weight", (64, 128), config)
        for layer in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_logits_are_of_order_one(variant: Variant) -> None:
    with session(variant.options(1, 64)) as run:
        prompt = run.prompt(48)
        request = GenerationRequest(0, prompt, 0, prompt_logprobs=True, top_logprobs=2)
        run.engine.add(request)
        (output,) = run.engine.step()
    # Of 512 tokens: neither all alike nor one that always wins.
    best = [entry.top[0][1] for entry in output.logprobs[1:]]
    assert -5.0 < sum(best) / len(best) < -0.5
