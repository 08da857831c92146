"""The CHASQUI_* variables of a deployment, of which each service reads its own."""

import re

import pytest

from serving.settings import ENV_PREFIX, misspelt_variables
from tests.deploy.conftest import ROOT, SERVICES

COMPOSE = ROOT / "docker-compose.yml"
OF_CLIENTS = {"CHASQUI_API_KEY", "CHASQUI_TARGET"}


@pytest.mark.parametrize("service", SERVICES)
def test_no_variable_of_another_service_is_taken_for_a_misspelt_one(service: str) -> None:
    fields = {name for settings in SERVICES.values() for name in settings.model_fields}
    composes = re.findall(r"CHASQUI_[A-Z_]+", COMPOSE.read_text())
    variables = {*(ENV_PREFIX + name.upper() for name in fields), *composes, *OF_CLIENTS}
    assert not misspelt_variables(SERVICES[service], variables)
