"""The kernels that are batch-invariant, compiled for cards that are not here: they fit, and few and
many rows add in one order.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have
ORDER = ("inputs", "instructions", "order_in_lanes", "steps_of_a_sum")


@pytest.mark.parametrize("which", ["bfloat16", pytest.param("all", marks=pytest.mark.thorough)])
def test_kernels_fit_and_sum_in_one_order_for_any_number_of_rows(
    which: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.model_service.compile_invariant_kernels", which]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    made = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    compiled: dict[str, list[dict[str, Any]]] = json.loads(made)
    assert compiled
    for name, kinds in compiled.items():
        for kind in kinds:
            assert kind["spilled"] == 0, (name, kind)
            assert kind["shared"] <= SHARED[kind["capability"]], (name, kind)
        if "inputs" in kinds[0]:
            few, many = ([kind[each] for each in ORDER] for kind in kinds)
            assert few == many, name
