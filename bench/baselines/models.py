"""A shape's weights in the format that a contender reads, exported once.

Exports run in a process of their own: its memory is gone before anything is measured.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.baselines.environments import REPOSITORY, UnavailableError


def ensure_model(kind: str, ckpt_dir: Path, work_dir: Path) -> Path:
    """The model file or folder.

    Args:
        kind: meta, hf, or a GGUF type.
        ckpt_dir: the shape's checkpoint in Meta's format.
        work_dir: where exports are kept.

    Raises:
        UnavailableError: the export failed, for example because the extra `bench` is not there.
    """
    if kind == "meta":
        return ckpt_dir
    exports = work_dir / "exports" / ckpt_dir.name
    target = exports / ("hf" if kind == "hf" else f"{kind}.gguf")
    if not target.exists():
        if kind == "hf":
            _export("bench.baselines.export.hf", ckpt_dir, target)
        else:
            _export("bench.baselines.export.gguf", ckpt_dir, target, kind)
    return target


def model_bytes(path: Path) -> int:
    """Size of a model's weight files."""
    if path.is_file():
        return path.stat().st_size
    files = (*path.glob("*.pth"), *path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _export(module: str, ckpt_dir: Path, target: Path, *arguments: str) -> None:
    partial = target.with_name(f"{os.getpid()}.{target.name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not target.suffix:
        partial.mkdir()
    command = [sys.executable, "-m", module, str(ckpt_dir), str(partial), *arguments]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        words = (done.stderr.splitlines() or ["no output"])[-1]
        raise UnavailableError(f"{module} failed: {words}")
    partial.rename(target)
