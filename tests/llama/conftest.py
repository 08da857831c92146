"""Models in this process and as several ranks, on the golden checkpoints."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama import Dialog, Llama

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOKENIZER = str(GOLDEN / "tokenizer.model")
REFUSAL = "Error: special tags are not allowed as part of the prompt."
DIALOG: Dialog = [{"role": "user", "content": "What do llamas eat?"}]


def build(name: str, **options: Any) -> Llama:
    arguments = {"max_seq_len": 256, "max_batch_size": 4} | options
    return Llama.build(str(GOLDEN / "checkpoints" / name), TOKENIZER, **arguments)


@pytest.fixture(scope="session")
def llama() -> Llama:
    return build("gqa-mp1")


def python(*command: object) -> str:
    """The output of the command, which must succeed."""
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(shards: int, *command: object) -> str:
    """The output of a Python script that runs on `shards` ranks."""
    return python("-m", "model_service.launcher", f"--shards={shards}", *command)
