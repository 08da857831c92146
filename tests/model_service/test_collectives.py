import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_service.model.cpu.kernels import without_kernels

LAYERS = 3  # of gqa-mp1


def told(shards: int, script: str, *arguments: str) -> list[Any]:
    """The line of JSON that each rank of a program writes."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "model_service.launcher", f"--shards={shards}"),
            *(str(Path(__file__).with_name(script)), *arguments),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=200,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == shards
    return lines


def test_a_step_sums_twice_per_layer_and_gathers_logits_only_where_wanted(golden: Path) -> None:
    for with_logits, without in told(2, "collectives.py", str(golden / "checkpoints" / "gqa-mp1")):
        # One more gather puts the parts of the embeddings together.
        assert with_logits == {"allreduce_": 2 * LAYERS, "allgather_": 2}
        assert without == {"allreduce_": 2 * LAYERS, "allgather_": 1}


@pytest.mark.parametrize("shards", [pytest.param(2, marks=pytest.mark.thorough), 4])
def test_what_shards_exchange_does_not_depend_on_the_other_rows(shards: int) -> None:
    for line in told(shards, "invariance_ranks.py"):
        assert line["differ"] == []
        assert ("bfloat16 none" in line["invariant"]) is (not without_kernels())
