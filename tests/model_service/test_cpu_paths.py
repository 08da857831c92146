"""The tests of the CPU's kernels, once more for each older processor that this one can stand for.

Environment variables hold each library to older instructions; they are read when it is loaded, so
every path has a process of its own, as has the path of an installation without a compiler. The
covered paths are printed at the end of the test run.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model_service.model.cpu.instructions import instructions
from model_service.model.cpu.kernels import without_kernels

FOLDER = Path(__file__).parent
NOT_COMPILED = "PyTorch's alone"
PATHS = {
    "avx512 vnni bf16 amx": {},
    "avx512 vnni bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512 vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def own_path() -> str:
    return NOT_COMPILED if without_kernels() else instructions()


def is_older(path: str, own: str) -> bool:
    """Whether a processor with the instructions `own` can be held to those of `path`."""
    needed = {*path.split()} - {"avx2"}  # which all with AVX-512 have
    return path != own and "avx512" in own and needed <= {*own.split()}


@pytest.mark.kernels
def test_the_kernels_of_this_processor_are_covered(
    record_property: Callable[[str, object], None],
) -> None:
    record_property("cpu_path", own_path())


def run_kernel_tests(path: str, *plugins: str) -> None:
    """The tests with the marker `kernels` in a process that takes this path."""
    arguments = ["-m", "kernels", "-n", "0", "-p", "no:cacheprovider", *plugins]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, FOLDER],
        env=os.environ | PATHS.get(path, {}),
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert f"kernels covered: {path};" in run.stdout


@pytest.mark.timeout(900)  # dozens of tests in one
@pytest.mark.parametrize(
    "path",
    # Those between share all but a few products with the newest and the oldest.
    [path if path == "avx2" else pytest.param(path, marks=pytest.mark.thorough) for path in PATHS],
)
def test_kernels_pass_their_tests_on_an_older_path(
    path: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("cpu_path", path)
    if not is_older(path, own := own_path()):
        pytest.skip(f"this process runs {own}")
    run_kernel_tests(path)


@pytest.mark.timeout(900)
def test_without_a_compiler_the_kernels_of_pytorch_pass_their_tests(
    record_property: Callable[[str, object], None],
) -> None:
    record_property("cpu_path", NOT_COMPILED)
    if own_path() == NOT_COMPILED:
        pytest.skip("this process runs them")
    run_kernel_tests(NOT_COMPILED, "-p", "tests.model_service.without_own_kernels")
