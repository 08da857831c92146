"""The environment in which FlashInfer compiles its kernels, and the error if it cannot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model_service.model.attention import flashinfer_kernels
from model_service.model.attention.flashinfer_kernels import (
    KernelTypes,
    compile_environment,
    compile_kernels,
    first_error,
    loaded_libraries,
    require_c_compiler,
)
from serving.errors import StartError

MAPS = """\
7f00 r-xp 00000000 08:01 11 /usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06
7f10 r-xp 00000000 08:01 12 /site-packages/nvidia/cu13/lib/libcudart.so.13
7f20 r-xp 00000000 08:01 13 /site-packages/torch/lib/libtorch_cuda.so
7f30 rw-p 00000000 00:00 0
"""
TYPES = KernelTypes(torch.bfloat16, torch.bfloat16, head_dim=128, tensor_cores=False)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA folder like that of a machine without cuBLAS, cuRAND and linkable libraries."""
    folder = tmp_path / "cuda-13.0"
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch(mode=0o755)
    return folder


def test_libraries_are_those_that_the_process_has_loaded(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(MAPS)
    assert loaded_libraries(tmp_path / "maps") == {
        "cuda": Path("/usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06"),
        "cudart": Path("/site-packages/nvidia/cu13/lib/libcudart.so.13"),
    }


def test_a_toolkit_gets_what_it_lacks_from_pytorch_and_the_driver(
    tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = tmp_path / "site" / "nvidia" / "cu13" / "include"
    headers.mkdir(parents=True)
    (headers / "cublasLt.h").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    given = {
        "PATH": str(toolkit / "bin"),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "FLASHINFER_EXTRA_CUDAFLAGS": "-lineinfo",
    }
    libraries = {"cuda": Path("/driver/libcuda.so.580"), "cudart": Path("/torch/libcudart.so.13")}
    for _ in range(2):  # another rank finds the links there
        added = compile_environment(given, libraries)
    links = tmp_path / ".cache" / "flashinfer" / "libraries"
    assert added["CUDA_HOME"] == str(toolkit)
    assert added["FLASHINFER_EXTRA_CUDAFLAGS"] == f"-lineinfo -isystem {headers}"
    assert added["FLASHINFER_EXTRA_LDFLAGS"] == f"-L{links}"
    assert {path.name: path.readlink() for path in links.iterdir()} == {
        "libcuda.so": libraries["cuda"],
        "libcudart.so": libraries["cudart"],
    }


def test_a_complete_toolkit_and_the_users_choice_stay_as_they_are(toolkit: Path) -> None:
    for name in ("lib64/libcudart.so", "lib64/stubs/libcuda.so", "include/cublasLt.h"):
        (toolkit / name).parent.mkdir(parents=True, exist_ok=True)
        (toolkit / name).touch()
    (toolkit / "include" / "curand_kernel.h").touch()
    given = {"CUDA_HOME": str(toolkit), "FLASHINFER_USE_CUDA_NORM": "0"}
    added = compile_environment(given, {"cuda": Path("/driver/libcuda.so.1")})
    assert added.keys() == {"CUDA_HOME", "PATH"}
    assert added["CUDA_HOME"] == str(toolkit)


def test_norms_are_the_same_kernels_with_and_without_cutlass() -> None:
    assert compile_environment({}, {})["FLASHINFER_USE_CUDA_NORM"] == "1"


def fake_module(name: str, loads: bool) -> Any:
    return SimpleNamespace(name=name, is_aot=loads, is_compiled=loads, try_load=lambda: loads)


def test_prebuilt_kernels_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [fake_module("norm", True), fake_module("page", True)]
    monkeypatch.setattr(flashinfer_kernels, "kernel_modules", lambda *_: kernels)
    monkeypatch.setenv("PATH", "")
    compile_kernels.__wrapped__(TYPES, (9, 0))


def test_what_is_missing_to_compile_is_named_before_anything_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels = [fake_module("norm", True), fake_module("decode", False)]
    monkeypatch.setattr(flashinfer_kernels, "kernel_modules", lambda *_: kernels)
    for name, value in (("PATH", ""), ("CUDA_HOME", str(tmp_path)), ("CXX", "c++")):
        monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=r"ninja .*nvcc .*C\+\+ compiler .* Missing are decode\."):
        compile_kernels.__wrapped__(TYPES, (9, 0))


def test_a_missing_c_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(StartError, match="install gcc or clang"):
        require_c_compiler()


def test_of_a_compilers_output_the_first_error_is_told() -> None:
    output = (
        "[1/2] nvcc -c norm.cu\ncudaUtils.h:25: fatal error: cublasLt.h: No such file\nninja: x"
    )
    assert first_error(output) == "cudaUtils.h:25: fatal error: cublasLt.h: No such file"
    assert "-lcudart" in first_error("FAILED: x.so\n/usr/bin/ld: cannot find -lcudart\n")
