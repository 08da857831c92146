import dataclasses
from pathlib import Path

import pytest
import torch

from bench.checkpoint import RandomWeights, ensure_checkpoint, random_weight
from bench.engine.driver import Job, loaded
from bench.shapes import SHAPES
from model_service.engine.sequence import GenerationRequest
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.files.meta.params import read_params
from model_service.model.weights.partition import shard_parameters
from model_service.model.weights.source import Shard


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
    config = dataclasses.replace(SHAPES["tiny"].config, trained_context_length=4096)
    assert read_params(tiny / "params.json") == config
    assert open_checkpoint(tiny).config.parameters == SHAPES["tiny"].parameters


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


def test_logits_are_of_order_one(job: Job) -> None:
    with loaded(job) as driver:
        (prompt,) = driver.prompts([48])
        request = GenerationRequest(0, prompt, 0, prompt_logprobs=True, top_logprobs=2)
        driver.engine.add(request)
        (output,) = driver.engine.step()
    # One of 512 tokens: neither all alike nor one that always wins.
    best = [entry.top[0][1] for entry in output.logprobs[1:]]
    assert -5.0 < sum(best) / len(best) < -0.5


@pytest.mark.parametrize("shards", [1, 2])
def test_random_shards_join_to_the_whole(shards: int) -> None:
    source = RandomWeights(SHAPES["tiny"].config)
    whole = dict(source.read_shard(Shard(0, 1, torch.float32, torch.device("cpu"))))
    parts = [
        dict(source.read_shard(Shard(rank, shards, torch.float32, torch.device("cpu"))))
        for rank in range(shards)
    ]
    name = "layers.1.feed_forward.w2.weight"
    assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole[name])
    assert sum(weight.numel() for weight in parts[0].values()) == shard_parameters(
        source.config, shards
    )
    assert source.config.parameters == SHAPES["tiny"].parameters


def test_engine_answers_the_same_from_a_file_and_from_weights_made_as_they_load(job: Job) -> None:
    answers = []
    for each in (job, dataclasses.replace(job, ckpt_dir=None)):
        with loaded(each) as driver:
            trial = driver.answer(driver.prompts([8]), 6)
            answers.append(driver.answers[next(iter(trial.prompts))])
    assert answers[0] == answers[1]
