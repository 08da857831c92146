"""Loads blocks of settings with the programs that they are written for."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from safety_service.rules import Rules
from serving.settings import ENV_PREFIX
from tests.deploy.conftest import KUBERNETES, ROOT, SERVICES
from tests.deploy.kustomize import build


def load_rules(text: str) -> None:
    """The safety service's rules."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.toml"
        path.write_text(text)
        Rules.read(path)


def load_compose(text: str) -> None:
    """An additional file for docker compose; its services and their settings must exist."""
    known: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in yaml.safe_load(text)["services"].items():
        assert name in known
        fields = {ENV_PREFIX + field.upper() for field in SERVICES[name].model_fields}
        assert service["environment"].keys() <= fields


def load_kustomization(text: str) -> None:
    """An addition to an overlay that has the model, here the demonstration's."""
    demo = KUBERNETES / "overlays" / "demo"
    added: dict[str, list[str]] = yaml.safe_load(text)
    paths = {kind: [str(demo / name) for name in names] for kind, names in added.items()}
    with tempfile.TemporaryDirectory() as folder:
        document = {"resources": [str(demo)], **paths}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(document))
        assert len(build(Path(folder))) > len(build(demo))


LOADERS: dict[str, dict[str, Callable[[str], None]]] = {
    "toml": {"rules": load_rules},
    "yaml": {"compose": load_compose, "kustomization": load_kustomization},
}
