import shutil
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_service.model.cuda import pinned_transfer
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.weights.files import read_parts
from model_service.model.weights.files.meta.checkpoint import open_checkpoint
from model_service.model.weights.source import Shard

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    buffer=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES),
    cut=st.booleans(),
)
def test_pieces_of_any_size_make_the_whole(
    shape: list[int], buffer: int, dtype: torch.dtype, cut: bool
) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape).float().to(dtype)
    source = whole[..., : max(1, shape[-1] // 2)] if cut else whole
    staged = WeightUpload(CPU, buffer)
    for _ in range(2):  # the buffers are used again
        target = torch.empty(source.shape, dtype=torch.float32)
        staged.copy(source, target)
        assert torch.equal(target, source.float())
    assert torch.equal(staged.moved(source).float(), source.float())


def test_a_part_of_a_tensor_is_filled() -> None:
    target = torch.zeros(4, 6)
    WeightUpload(CPU, 16).copy(torch.ones(4, 2), target.narrow(1, 3, 2))
    assert torch.equal(target.sum(dim=0), torch.tensor([0.0, 0.0, 0.0, 4.0, 4.0, 0.0]))


def test_on_the_cpu_nothing_is_moved() -> None:
    source = torch.ones(3)
    assert WeightUpload(CPU).moved(source) is source


@pytest.fixture
def large_checkpoint(golden: Path, tmp_path: Path) -> Path:
    """As `mha-mp1`, but its embeddings and output matrices of 38 MB each."""
    source = golden / "checkpoints" / "mha-mp1"
    weights = torch.load(source / "consolidated.00.pth", weights_only=True)
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name] = torch.zeros(150_000, 64)
    torch.save(weights, tmp_path / "consolidated.00.pth")
    shutil.copy(source / "params.json", tmp_path)
    return tmp_path


def test_host_holds_two_buffers_and_never_the_checkpoint(
    large_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned_transfer, "BUFFER_BYTES", 2**22)
    # The device meta has no numbers to look at.
    monkeypatch.setattr(read_parts, "extremes", lambda _: torch.zeros(2))
    checkpoint = open_checkpoint(large_checkpoint)
    process = psutil.Process()

    def own() -> int:  # without the pages of mapped files
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before = own()
    weights = checkpoint.read_shard(Shard(0, 1, torch.float16, torch.device("meta")))
    held = max(own() - before for _ in weights)
    assert held < 25e6 < checkpoint.config.parameters * 4 / 3


@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
def test_every_number_of_16_bits_is_rounded_as_pytorch_does(
    stored: torch.dtype, wanted: torch.dtype
) -> None:
    source = torch.arange(2**20).to(torch.int16).view(stored).view(16, 256, 256)
    target = torch.empty(source.transpose(1, 2).shape, dtype=wanted)
    WeightUpload(CPU).copy(source.transpose(1, 2), target)
    torch.testing.assert_close(
        target, source.transpose(1, 2).to(wanted), rtol=0, atol=0, equal_nan=True
    )
