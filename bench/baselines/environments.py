"""A virtual environment per peer, made when it is first wanted and kept in the work folder.

Peers want different versions of the same packages, and none of them belongs into ours. An
environment that is there and was made from the same requirements is used as it is.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
REPOSITORY = Path(__file__).parents[2]


class UnavailableError(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a peer's environment is made."""

    layered: bool = False  # sees our packages (PyTorch above all) behind its own
    tools: tuple[str, ...] = ()  # programs that the build needs
    removed: tuple[str, ...] = ()  # packages that are uninstalled again
    build: Mapping[str, str] = field(default_factory=dict)  # environment variables of pip
    run: Mapping[str, str] = field(default_factory=dict)  # environment variables of the worker


RECIPES: Mapping[str, Recipe] = {
    "transformers": Recipe(layered=True),
    "llama_cpp": Recipe(
        tools=("cmake", "g++"), build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
    ),
    "vllm": Recipe(
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

    python: Path
    variables: Mapping[str, str]


def own_environment() -> Environment:
    """The environment that this process runs in: Chasqui's."""
    return Environment(Path(sys.executable), {})


def prepare(name: str, work_dir: Path) -> Environment:
    """The environment of a peer, a key of RECIPES, made if needed; compiling may take minutes.

    Raises:
        UnavailableError: it cannot be made on this machine.
    """
    recipe = RECIPES[name]
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = work_dir / "environments" / f"{name}-{_identity(requirements, recipe)}"
    if not (folder / "complete").exists():
        _make(folder, requirements, recipe)
        (folder / "complete").touch()
    return Environment(folder / "bin" / "python", recipe.run)


def _identity(requirements: Path, recipe: Recipe) -> str:
    text = f"{requirements.read_text(encoding='utf-8')} {recipe} {sys.version}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _make(folder: Path, requirements: Path, recipe: Recipe) -> None:
    missing = [tool for tool in recipe.tools if shutil.which(tool) is None]
    if missing:
        raise UnavailableError(f"building it needs {' and '.join(missing)}")
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], log, {})
    python = folder / "bin" / "python"
    if recipe.layered:
        inner = sysconfig.get_path("purelib", vars={"base": str(folder)})
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (Path(inner) / "chasqui.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "-r", str(requirements)], log, recipe.build)
    if recipe.removed:
        _run([str(python), "-m", "pip", "uninstall", "--yes", *recipe.removed], log, {})


def _run(command: list[str], log: Path, variables: Mapping[str, str]) -> None:
    with log.open("ab") as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, env={**os.environ, **variables}, check=False
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.strip() for line in lines if line.lstrip().lower().startswith("error")]
        reason = (errors or lines or ["no output"])[-1]
        raise UnavailableError(f"cannot be installed: {reason} (all of it: {log})")
