"""docker-compose.yml fits the services; `docker compose` itself is not in CI."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.settings import GatewaySettings
from serving.settings import ENV_PREFIX
from tests.deploy.conftest import ROOT, SERVICES

DOCUMENT = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
# Settings that a deployment does not change, or changes in another file because they need mounts.
COMPOSES_OWN = {
    *("CHASQUI_HOST", "CHASQUI_PORT", "CHASQUI_HTTP_PORT", "CHASQUI_HEALTH_PORT"),
    "CHASQUI_DEVICE",
}
FILES = {
    *("CHASQUI_TLS_CERT", "CHASQUI_TLS_KEY", "CHASQUI_TLS_CLIENT_CA", "CHASQUI_API_KEYS"),
    *(
        "CHASQUI_UPSTREAM_CA",
        "CHASQUI_UPSTREAM_CERT",
        "CHASQUI_UPSTREAM_KEY",
        "CHASQUI_UPSTREAM_NAME",
    ),
    *("CHASQUI_RULES", "CHASQUI_GUARD_POLICY", "CHASQUI_DRAFT_CKPT_DIR"),
}
# Limits for untrusted clients, which can reach only the gateway.
OF_UNTRUSTED = {
    *("CHASQUI_MAX_CONNECTIONS", "CHASQUI_MAX_CONCURRENT_STREAMS", "CHASQUI_RECEIVE_TIMEOUT"),
    "CHASQUI_MAX_CONNECTION_IDLE",
}
OURS = {name: DOCUMENT["services"][name] for name in SERVICES}


@pytest.mark.parametrize("name", OURS)
def test_service_runs_without_privileges_on_a_read_only_file_system(name: str) -> None:
    service = OURS[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", OURS)
def test_variables_are_settings_of_the_service(name: str) -> None:
    known = {ENV_PREFIX + field.upper() for field in SERVICES[name].model_fields}
    assert OURS[name]["environment"].keys() <= known


@pytest.mark.parametrize("name", OURS)
def test_every_setting_passes_through_that_is_not_composes_own(name: str) -> None:
    known = {ENV_PREFIX + field.upper() for field in SERVICES[name].model_fields}
    left_out = COMPOSES_OWN | FILES | (set() if name == "gateway" else OF_UNTRUSTED)
    assert known - left_out <= OURS[name]["environment"].keys()


@pytest.mark.parametrize("name", OURS)
def test_service_comes_back_and_gets_its_grace_period(name: str) -> None:
    service: dict[str, Any] = OURS[name]
    # With a bound, as in on-failure:3, Docker counts all failures of a container's life.
    assert service["restart"] == "on-failure"
    # Two durations add up: so many seconds, and as many as running requests get.
    assert re.fullmatch(r"\d+s\$\{CHASQUI_GRACE_PERIOD:-30\}s", service["stop_grace_period"])


@pytest.mark.parametrize("name", OURS)
def test_healthcheck_asks_the_port_that_the_service_listens_on(name: str) -> None:
    port = SERVICES[name].model_fields["port"].default
    assert OURS[name]["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"


def test_published_ports_are_those_that_the_gateway_listens_on() -> None:
    ports = [each.rpartition(":")[2] for each in OURS["gateway"]["ports"]]
    settings = GatewaySettings()
    assert ports == [str(settings.port), str(settings.http_options.port)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("", "chasqui-demo"), ("/data/llama-2-13b-chat", "llama-2-13b-chat"), ("../7b/", "7b")],
)
def test_model_has_the_name_of_its_folder(folder: str, name: str) -> None:
    service: dict[str, Any] = OURS["model"]
    mounted = re.sub(
        r"\$\{CHASQUI_CKPT_DIR:-(.*)\}", folder or r"\1", service["volumes"][0]["target"]
    )
    assert service["environment"]["CHASQUI_CKPT_DIR"] == service["volumes"][0]["target"]
    assert Path(mounted).name == name
