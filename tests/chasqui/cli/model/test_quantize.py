from pathlib import Path
from typing import Any

from chasqui.cli.serve.deployment import demonstration


def test_quantized_checkpoint_is_half_as_large(run: Any, tmp_path: Path) -> None:
    demo = demonstration()
    folder = tmp_path / "int8"
    written = run("model", "quantize", "--ckpt_dir", demo.ckpt_dir, "--output_dir", folder)
    assert written.returncode == 0, written.stderr
    assert (folder / "consolidated.00.pth").stat().st_size < 0.7 * (
        demo.ckpt_dir / "consolidated.00.pth"
    ).stat().st_size


def test_why_a_checkpoint_cannot_be_quantized_is_one_line(run: Any, tmp_path: Path) -> None:
    done = run("model", "quantize", "--ckpt_dir", tmp_path, "--output_dir", tmp_path / "new")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "holds no checkpoint" in done.stderr
