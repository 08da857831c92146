"""python -m bench.gpu compile FOLDER: FlashInfer's kernels, compiled for a machine without time.

Put FOLDER on that machine's PYTHONPATH: it has a package `flashinfer_jit_cache` of the installed
FlashInfer's version, in which FlashInfer looks first. nvcc takes minutes and needs no GPU.
"""

import os
import subprocess
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path

import torch

from model_service.model.attention.flashinfer_kernels import (
    KernelTypes,
    import_flashinfer,
    kernel_modules,
    loaded_libraries,
)

_TYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "fp8 cache": (torch.bfloat16, torch.float8_e4m3fn),
}
_PACKAGE = '''"""FlashInfer's kernels, compiled beforehand."""

from pathlib import Path

__version__ = "{version}"


def get_jit_cache_dir() -> str:
    return str(Path(__file__).resolve().parent / "jit_cache")
'''


def main(arguments: list[str]) -> None:
    """Raises RuntimeError with the compiler's output if it fails."""
    parser = ArgumentParser("python -m bench.gpu compile", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--capability", default="9.0a", help="the card's; default: 9.0a, Hopper's")
    parser.add_argument("--types", nargs="+", choices=_TYPES, default=[*_TYPES])
    args = parser.parse_args(arguments)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = args.capability
    if "cuda" not in loaded_libraries():
        _add_driver_stub(args.folder)
    version = import_flashinfer().__version__
    from flashinfer.jit import build_jit_specs  # noqa: PLC0415  # an optional extra

    modules = wanted_modules(args.types, args.capability)
    build_jit_specs([*modules.values()])
    write_package(args.folder / "flashinfer_jit_cache", version, modules)


def wanted_modules(types: list[str], capability: str) -> dict[str, object]:
    """The kernels by name, for heads of 128 of their own and grouped ones."""
    major, minor = capability.rstrip("af").split(".")
    found = {}
    for name in types:
        for grouped in (False, True):
            kernels = KernelTypes(*_TYPES[name], head_dim=128, tensor_cores=grouped)
            for module in kernel_modules(kernels, (int(major), int(minor))):
                found[module.name] = module
    return found


def write_package(package: Path, version: str, modules: Mapping[str, object]) -> None:
    """The compiled modules without symbols, as a package of FlashInfer's `version`."""
    for name, module in modules.items():
        target = package / "jit_cache" / name / f"{name}.so"
        target.parent.mkdir(parents=True, exist_ok=True)
        library = str(module.get_library_path())  # type: ignore[attr-defined]
        subprocess.run(["strip", "-o", str(target), library], check=True)
        print(f"{target.stat().st_size / 1e6:5.1f} MB {name}", flush=True)
    (package / "__init__.py").write_text(_PACKAGE.format(version=version), encoding="utf-8")


def _add_driver_stub(folder: Path) -> None:
    """Lets kernels link on a machine without a driver, whose library they load later."""
    folder.mkdir(parents=True, exist_ok=True)
    stub = folder / "libcuda.so"
    command = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", str(stub)]
    subprocess.run(command, check=True)
    given = os.environ.get("FLASHINFER_EXTRA_LDFLAGS", "")
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = f"{given} -L{folder.resolve()}".strip()
