"""python -m bench.gpu check: what only a GPU can show of the tests, the most important first.

They print what they measure as they go, so that a run that is cut off has told what it knew.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_ENGINES = "tests/model_service/cuda/test_cuda.py::"
TESTS = (
    _ENGINES + "test_golden_cases_are_exact_in_float32",
    _ENGINES + "test_a_seed_draws_the_same_tokens_as_on_the_cpu",
    _ENGINES + "test_no_call_waits_for_the_device_between_launch_and_reading",
    _ENGINES + "test_answers_in_half_precision_take_nearly_the_best_tokens",
    _ENGINES + "test_golden_cases_are_exact_by_the_invariant_kernels",
    _ENGINES + "test_a_batch_invariant_answer_has_the_same_bits_alone_and_in_a_crowd",
    "tests/model_service/test_flashinfer.py",
)


def main(arguments: list[str]) -> None:
    """Raises SystemExit with pytest's status."""
    parser = ArgumentParser("python -m bench.gpu check", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="selects tests, as pytest's")
    parser.add_argument("--timeout", default="60", help="seconds for one test; default: 60")
    args = parser.parse_args(arguments)
    command = [sys.executable, "-m", "pytest", "-s", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--timeout={args.timeout}", "-k", args.k, *TESTS]
    environ = os.environ | {"CUDA_TESTS_DEVICE": args.device}
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode)
