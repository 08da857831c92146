"""FlashInfer's compiled kernels: taken as they are, or compiled together when a model is loaded.

FlashInfer looks for a kernel in the package `flashinfer-jit-cache`, if one of its own version is
installed. Otherwise it runs ninja, which compiles what `~/.cache/flashinfer` does not have yet. By
itself it does so at a kernel's first use, one after the other, and finds neither the headers nor
the libraries that came with PyTorch. So `import_flashinfer` prepares its environment, and
`compile_kernels` has all that a model needs compiled at once, or says what is missing.
"""

import functools
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from serving.errors import StartError

_log = logging.getLogger(__name__)

# Query heads per key head from which tensor cores compute faster than memory delivers the keys.
# Fewer heads would leave most of a tile empty.
_TENSOR_CORES_FROM = 4
_HOPPER = 9  # the compute capability whose prefill kernels are others
_LINKED = ("cudart", "cuda")  # what FlashInfer passes to the linker
# Headers of its kernels for norms and for prefill on Hopper, beside those of the runtime.
_HEADERS = ("cublasLt.h", "curand_kernel.h")


@dataclass(frozen=True, slots=True)
class KernelTypes:
    """The types and sizes for which the kernels of one rank are compiled."""

    dtype: torch.dtype  # of queries and results
    kv_dtype: torch.dtype  # of keys and values in the cache
    head_dim: int
    tensor_cores: bool  # whether decode takes the prefill kernel, as grouped heads do


def decodes_on_tensor_cores(heads: int, kv_heads: int) -> bool:
    """Whether decode is a case for FlashInfer's prefill kernels."""
    return heads // kv_heads >= _TENSOR_CORES_FROM


def import_flashinfer() -> ModuleType:
    """The package `flashinfer`, which reads its environment when it is imported."""
    if "flashinfer" not in sys.modules:
        os.environ.update(compile_environment(os.environ, loaded_libraries()))
    import flashinfer  # noqa: PLC0415  # an optional extra

    return flashinfer  # type: ignore[no-any-return]  # it has no types


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> dict[str, Path]:
    """The libraries among `_LINKED` that this process has loaded, by name.

    PyTorch has loaded the driver's and the runtime's once it has used a device.
    """
    found: dict[str, Path] = {}
    for line in maps.read_text().splitlines() if maps.exists() else ():
        path = Path(line.rpartition(" ")[2])
        name = path.name.partition(".so")[0].removeprefix("lib")
        if name in _LINKED:
            found[name] = path
    return found


def compile_environment(
    environ: Mapping[str, str], libraries: Mapping[str, Path]
) -> dict[str, str]:
    """The variables that FlashInfer needs beside those in `environ`.

    Args:
        environ: of this process.
        libraries: those in `_LINKED` that are loaded, by name; the linker finds them by links in
            FlashInfer's folder if the CUDA toolkit does not have them.
    """
    # Otherwise the norms are other kernels where nvidia-cutlass-dsl is installed than where not.
    added = {} if "FLASHINFER_USE_CUDA_NORM" in environ else {"FLASHINFER_USE_CUDA_NORM": "1"}
    own_programs = str(Path(sys.executable).parent)  # pip puts ninja there
    if own_programs not in (path := environ.get("PATH", "")).split(os.pathsep):
        added["PATH"] = f"{path}{os.pathsep}{own_programs}"
    toolkit = _toolkit(environ)
    if toolkit is None:
        return added
    added["CUDA_HOME"] = str(toolkit)
    if folders := [*_header_folders(toolkit)]:
        # Behind the toolkit's own headers, which must be of the same version as nvcc.
        flags = [flag for folder in folders for flag in ("-isystem", str(folder))]
        added["FLASHINFER_EXTRA_CUDAFLAGS"] = _joined(environ, "FLASHINFER_EXTRA_CUDAFLAGS", flags)
    missing = {name for name in _LINKED if not _in_toolkit(toolkit, name)} & libraries.keys()
    if missing:
        base = Path(environ.get("FLASHINFER_WORKSPACE_BASE", Path.home()))
        folder = base / ".cache" / "flashinfer" / "libraries"
        _link(folder, {name: libraries[name] for name in missing})
        added["FLASHINFER_EXTRA_LDFLAGS"] = _joined(
            environ, "FLASHINFER_EXTRA_LDFLAGS", [f"-L{folder}"]
        )
    return added


def _toolkit(environ: Mapping[str, str]) -> Path | None:
    """The folder of the CUDA toolkit; nvcc on the PATH may be a link or a script elsewhere."""
    if named := environ.get("CUDA_HOME") or environ.get("CUDA_PATH"):
        return Path(named)
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    around = [Path(nvcc).resolve().parents[1]] if nvcc else []
    usual = sorted(Path("/usr/local").glob("cuda*"), key=lambda path: (len(path.name), path.name))
    complete = (
        folder
        for folder in [*around, *usual]
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists()
    )
    return next(complete, None)


def _in_toolkit(toolkit: Path, name: str) -> bool:
    folders = (toolkit / "lib64", toolkit / "lib64" / "stubs")
    return any((folder / f"lib{name}.so").exists() for folder in folders)


def _header_folders(toolkit: Path) -> Iterator[Path]:
    """The folders of PyTorch's own packages with those of `_HEADERS` that the toolkit lacks."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    lacking = [name for name in _HEADERS if not (toolkit / "include" / name).exists()]
    found = (
        path.parent for root in roots for name in lacking for path in root.glob(f"*/include/{name}")
    )
    yield from dict.fromkeys(found)


def _joined(environ: Mapping[str, str], name: str, flags: Iterable[str]) -> str:
    return shlex.join([*shlex.split(environ.get(name, "")), *flags])


def _link(folder: Path, libraries: Mapping[str, Path]) -> None:
    """Links with the names by which the linker looks; several ranks may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in libraries.items():
        partial = folder / f"{os.getpid()}.{name}"
        partial.symlink_to(path)
        partial.replace(folder / f"lib{name}.so")


def kernel_modules(types: KernelTypes, capability: tuple[int, int]) -> list[Any]:
    """FlashInfer's descriptions (`JitSpecNvcc`) of all kernels that a model uses.

    Args:
        types: of the model.
        capability: of the device, on which the choice of the prefill kernel depends.
    """
    import_flashinfer()
    from flashinfer import jit  # noqa: PLC0415
    from flashinfer.jit.norm import gen_norm_module  # noqa: PLC0415

    # Index type, head_dim of queries and values; no rotation, no window, no cap inside attention.
    rest = (torch.int32, types.head_dim, types.head_dim, 0, False, False)
    attention = (types.dtype, types.kv_dtype, types.dtype, *rest)
    # `determine_attention_backend` in flashinfer/utils.py.
    hopper = capability[0] == _HOPPER and types.kv_dtype == types.dtype
    kernels = [
        gen_norm_module(),
        jit.gen_act_and_mul_module("silu"),
        jit.gen_batch_prefill_module("fa3" if hopper else "fa2", *attention, False),
    ]
    if not types.tensor_cores:
        kernels.append(jit.gen_batch_decode_module(*attention))
    elif hopper:
        kernels.append(jit.gen_batch_prefill_module("fa2", *attention, False))
    return kernels


@functools.cache
def compile_kernels(types: KernelTypes, capability: tuple[int, int]) -> None:
    """Compiles the kernels of a model that are not there yet, all at once; minutes.

    Raises:
        StartError: they are not there, and this machine cannot compile them.
    """
    kernels = kernel_modules(types, capability)
    # Loading shows whether a prebuilt kernel fits this machine's libraries.
    missing = [kernel for kernel in kernels if not (kernel.is_aot and kernel.try_load())]
    ready = len(kernels) - len(missing)
    _log.info("FlashInfer: %d of %d kernels are prebuilt", ready, len(kernels))
    if not missing:
        return
    if obstacles := [*_obstacles(compiled=all(kernel.is_compiled for kernel in missing))]:
        names = ", ".join(kernel.name for kernel in missing)
        raise StartError(
            f"FlashInfer cannot compile its kernels here: {'; '.join(obstacles)}. Missing are "
            f"{names}. To fix: install what is missing, or the package flashinfer-jit-cache of "
            "FlashInfer's version, which has them compiled; without FlashInfer (pip uninstall "
            "flashinfer-python) PyTorch's slower kernels serve"
        )
    from flashinfer.jit import build_jit_specs  # noqa: PLC0415

    started = time.monotonic()
    try:
        # Not skipping prebuilt ones, because those among `missing` did not load.
        build_jit_specs(missing, skip_prebuilt=False)
    except RuntimeError as error:
        raise StartError(
            f"FlashInfer could not compile its kernels: {first_error(str(error))}. To fix: "
            "see CUDA_HOME, FLASHINFER_EXTRA_CUDAFLAGS and FLASHINFER_EXTRA_LDFLAGS in "
            "docs/operations/weights.md, or install flashinfer-jit-cache of FlashInfer's version"
        ) from error
    _log.info("FlashInfer: %d kernels compiled in %.1f s", len(missing), time.monotonic() - started)


def require_c_compiler() -> None:
    """Raises StartError if Triton cannot compile the code that starts our own kernel."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise StartError(
            "attention on CUDA needs a C compiler, with which Triton makes the kernel that rotates "
            "and writes keys: install gcc or clang, or name one in CC"
        )


def _obstacles(*, compiled: bool) -> Iterator[str]:
    """Why kernels cannot be compiled; if all are `compiled`, ninja still has to look at them."""
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        yield "FLASHINFER_DISABLE_JIT is set"
    if shutil.which("ninja") is None:
        yield "ninja is not on the PATH (pip install ninja)"
    if compiled:
        return
    if not Path(os.environ.get("CUDA_HOME", ""), "bin", "nvcc").exists():
        yield "there is no CUDA toolkit with nvcc (CUDA_HOME names its folder)"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        yield "there is no C++ compiler (g++, or the one that CXX names)"


def first_error(output: str) -> str:
    """The first line of a compiler's or linker's output that names an error."""
    lines = [line.strip() for line in output.splitlines()]
    named = (line for line in lines if "error" in line.lower() or "cannot find" in line)
    return next(named, lines[-1] if lines else "it says nothing")
