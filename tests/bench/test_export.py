"""Files that the peers read; the formats need the packages of the extra `bench`."""

import json
from pathlib import Path

import pytest
import torch

from bench.baselines.environments import UnavailableError
from bench.baselines.models import ensure_model, model_bytes
from bench.engine.session import Variant, session
from bench.shapes import SHAPES
from model_service.model.weights.checkpoint import open_checkpoint

PROMPT = (300, 400, 500, 301, 402)


@pytest.fixture(scope="module")
def weights(tiny: Path) -> dict[str, torch.Tensor]:
    """The checkpoint, by Meta's names."""
    cpu = torch.device("cpu")
    return dict(open_checkpoint(tiny).read_shard(0, 1, torch.float32, cpu))


@pytest.fixture(scope="module")
def hf_folder(tiny: Path, work_dir: Path) -> Path:
    """The checkpoint as Hugging Face has it."""
    pytest.importorskip("safetensors")
    from bench.baselines.export.hf import export_hf  # noqa: PLC0415  # needs safetensors

    folder = work_dir / "exports" / tiny.name / "hf"
    folder.mkdir(parents=True)
    export_hf(tiny, folder)
    return folder


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0.0), ("Q8_0", 0.02), ("Q4_0", 0.3)])
def test_gguf_holds_the_checkpoints_numbers(
    tiny: Path, tmp_path: Path, weights: dict[str, torch.Tensor], kind: str, tolerance: float
) -> None:
    gguf = pytest.importorskip("gguf")
    from bench.baselines.export.gguf import export_gguf  # noqa: PLC0415  # needs gguf

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
    expected = weights["layers.0.feed_forward.w3.weight"]
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], expected)
    assert json.loads((hf_folder / "config.json").read_text())["intermediate_size"] == 352
    assert model_bytes(hf_folder) > 2 * SHAPES["tiny"].parameters


def test_transformers_continues_as_the_engine(hf_folder: Path, variant: Variant) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    ids = list(PROMPT)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    with session(variant.options(1, 32)) as run:
        assert max(run.shortfalls(PROMPT, tuple(ids[len(PROMPT) :]))) < 1e-4


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"bench\.baselines\.export\.gguf failed"):
        ensure_model("F32", tmp_path / "no-checkpoint", tmp_path)
    assert not list((tmp_path / "exports" / "no-checkpoint").iterdir())
