"""docker-compose.yml against what the services are; `docker compose` itself is not in CI."""

import re
from typing import Any

import pytest
import yaml

from serving.settings import ENV_PREFIX
from tests.deploy.conftest import IMAGE_VARIABLES, ROOT, SERVICES

DOCUMENT = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
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
    assert OURS[name]["environment"].keys() <= known | IMAGE_VARIABLES


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
