"""The manifests of deploy/kubernetes as a cluster would get them, and the settings of the services
that they start.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gateway.settings import GatewaySettings
from model_service.settings import ModelSettings
from safety_service.settings import SafetySettings
from serving.settings import ENV_PREFIX, ServerSettings, parse
from tests.deploy.kustomize import Manifest, build, pod_templates
from tokenizer_service.settings import TokenizerSettings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
# The components that a component needs.
NEEDS = {"safety-security": ["safety", "security"]}

SERVICES: dict[str, type[ServerSettings]] = {
    "gateway": GatewaySettings,
    "tokenizer": TokenizerSettings,
    "safety": SafetySettings,
    "model": ModelSettings,
}


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that a build starts."""

    component: str
    labels: dict[str, str]
    spec: Manifest
    environment: dict[str, str]

    @property
    def container(self) -> Manifest:
        [container] = self.spec["containers"]
        found: Manifest = container
        return found

    @property
    def service(self) -> str:
        """Which of the services runs in it."""
        name: str = self.container["name"]
        return name


ReadSettings = Callable[[str, dict[str, str]], ServerSettings]


@pytest.fixture(scope="session", params=[*OVERLAYS, *(f"demo + {name}" for name in COMPONENTS)])
def manifests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Manifest]:
    """Each overlay as it is, and the demonstration with each component and what that needs."""
    overlay, _, component = request.param.partition(" + ")
    components = [*NEEDS.get(component, []), component] if component else []
    kustomization = {
        "resources": [str(KUBERNETES / "overlays" / overlay)],
        "components": [str(KUBERNETES / "components" / name) for name in components],
    }
    folder = tmp_path_factory.mktemp("overlay")
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(folder)


@pytest.fixture
def pods(manifests: list[Manifest]) -> list[Pod]:
    return list(_pods(manifests))


@pytest.fixture
def read_settings(monkeypatch: pytest.MonkeyPatch) -> ReadSettings:
    """Reads a service's settings from an environment, as the service would; refuses wrong names."""

    def read(service: str, environment: dict[str, str]) -> ServerSettings:
        settings = SERVICES[service]
        known = {ENV_PREFIX + name.upper() for name in settings.model_fields}
        ours = {name for name in environment if name.startswith(ENV_PREFIX)}
        assert ours <= known
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return parse(settings, prog=service, argv=[])

    return read


def _pods(manifests: list[Manifest]) -> Iterator[Pod]:
    maps = {
        each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "ConfigMap"
    }
    for manifest in manifests:
        for template in pod_templates(manifest):
            labels = template["metadata"]["labels"]
            [container] = template["spec"]["containers"]
            environment: dict[str, str] = {}
            for source in container.get("envFrom", []):
                environment |= maps[source["configMapRef"]["name"]]
            environment |= {each["name"]: each["value"] for each in container.get("env", [])}
            component = labels["app.kubernetes.io/component"]
            yield Pod(component, labels, template["spec"], environment)
