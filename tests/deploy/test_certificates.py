"""The certificates that docs/operations/kubernetes.md makes, between real servers and callers."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest

from serving.security.tls import TlsFiles, UpstreamCertificates
from serving.server import Service, channel, running
from serving.settings import ServerSettings
from tests.deploy.conftest import ROOT

SERVICES_CA, GATEWAYS_CA = "services-authority", "gateways-authority"
# Signed by the gateways' authority, but for servers.
MISUSED = (
    f"new misused -CA {GATEWAYS_CA}.crt -CAkey {GATEWAYS_CA}.key "
    "-addext extendedKeyUsage=serverAuth -addext basicConstraints=CA:FALSE"
)

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands of the page make."""
    made = tmp_path_factory.mktemp("certificates")
    page = (ROOT / "docs" / "operations" / "kubernetes.md").read_text()
    [commands] = [
        each for each in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "openssl" in each
    ]
    script = f"set -eu\n{commands}\n{MISUSED}\n"
    subprocess.run(["bash", "-c", script], cwd=made, check=True, capture_output=True)
    return made


async def status(folder: Path, shown: str, caller: str | None, expected: str) -> grpc.StatusCode:
    """How a service that shows one certificate answers a caller that shows another."""

    def pem(name: str | None, kind: str) -> Path | None:
        return None if name is None else folder / f"{name}.{kind}"

    settings = ServerSettings(
        tls_cert=pem(shown, "crt"),
        tls_key=pem(shown, "key"),
        tls_client_ca=pem(GATEWAYS_CA, "crt"),
    )
    files = TlsFiles(pem(caller, "crt"), pem(caller, "key"), pem(SERVICES_CA, "crt"))
    async with (
        running(settings, Service(["test.A"], lambda _: None)) as server,
        channel(server.address, UpstreamCertificates(files, expected)) as to_server,
    ):
        health: Any = health_pb2_grpc.HealthStub(to_server)
        code: grpc.StatusCode = await health.Check(HealthCheckRequest(), timeout=30).code()
        return code


@pytest.mark.parametrize("service", ["tokenizer", "model", "safety"])
async def test_services_answer_gateways(folder: Path, service: str) -> None:
    code = await status(folder, service, "gateway", f"chasqui-{service}")
    assert code is grpc.StatusCode.OK


@pytest.mark.parametrize("caller", [None, "tokenizer", "safety", "model", "misused"])
async def test_model_answers_nothing_else(folder: Path, caller: str | None) -> None:
    assert await status(folder, "model", caller, "chasqui-model") is grpc.StatusCode.UNAVAILABLE


async def test_tokenizer_cannot_pass_for_a_model(folder: Path) -> None:
    code = await status(folder, "tokenizer", "gateway", "chasqui-model")
    assert code is grpc.StatusCode.UNAVAILABLE
