"""`chasqui doctor`: the machine that runs the tests, and what it says of one that is not fit."""

import importlib.metadata
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from chasqui.cli.doctor import machine, packages
from chasqui.cli.doctor.finding import Finding, Verdict
from chasqui.cli.doctor.packages import check_extras
from chasqui.cli.doctor.ports import check_ports
from tests.command import GOLDEN, Run


def wrong(findings: list[Finding]) -> list[str]:
    return [str(each) for each in findings if each.verdict is Verdict.WRONG]


@dataclass(frozen=True)
class FreePorts:
    """Two ports that are free now, one for each protocol."""

    grpc: int
    http: int

    @property
    def flags(self) -> tuple[str, ...]:
        return "--port", str(self.grpc), "--http_port", str(self.http)

    def are_fine_in(self, report: str) -> bool:
        lines = f"{self.grpc} is free (gateway)\n", f"{self.http} is free (gateway, HTTP)\n"
        return all(line in report for line in lines)


@pytest.fixture
def free_ports() -> FreePorts:
    with socket.socket() as grpc, socket.socket() as http:
        for each in (grpc, http):
            each.bind(("127.0.0.1", 0))
        return FreePorts(grpc.getsockname()[1], http.getsockname()[1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_each_part_of_a_good_set_up_is_fine(free_ports: FreePorts, run: Run) -> None:
    done = run("doctor", *free_ports.flags)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    subjects = {line.split()[1] for line in lines if line.startswith("fine")}
    assert {"Python", "[model]", "[tokenizer]", "[serving]", "port"} <= subjects
    assert any(line.split()[1] == "processor" for line in lines)  # a note without a compiler
    assert {"CUDA", "memory", "model", "tokenizer"} <= subjects
    assert free_ports.are_fine_in(done.stdout)


def test_a_fault_makes_the_status_1(free_ports: FreePorts, tmp_path: Path, run: Run) -> None:
    done = run("doctor", *free_ports.flags, "--ckpt_dir", str(tmp_path / "none"))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert f"{tmp_path / 'none'}: not found. To fix: name a folder" in line


def test_a_taken_port_is_named_with_its_holder_and_another_port(
    taken_port: int, free_ports: FreePorts
) -> None:
    [line] = wrong([*check_ports("127.0.0.1", taken_port, free_ports.http)])
    assert f"{taken_port} (gateway): Address already in use" in line
    assert f"by process {os.getpid()}" in line
    assert "chasqui serve --port" in line


def test_a_taken_port_for_http_can_be_changed_or_done_without(
    taken_port: int, free_ports: FreePorts
) -> None:
    [line] = wrong([*check_ports("127.0.0.1", free_ports.grpc, taken_port)])
    assert f"{taken_port} (gateway, HTTP): Address already in use" in line
    assert f"by process {os.getpid()}" in line
    assert "chasqui serve --http_port" in line
    assert line.endswith(", or none: --http_port 0")
    assert not wrong([*check_ports("127.0.0.1", free_ports.grpc, 0)])


def test_one_port_for_both_protocols_is_wrong(free_ports: FreePorts) -> None:
    [line] = wrong([*check_ports("127.0.0.1", free_ports.grpc, free_ports.grpc)])
    assert f"{free_ports.grpc} is named twice" in line
    assert "chasqui serve --http_port" in line


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = packages.installed_version

    def without_torch(name: str) -> str | None:
        return None if name == "torch" else installed(name)

    monkeypatch.setattr(packages, "installed_version", without_torch)
    [line] = wrong([*check_extras()])
    assert "[model]" in line
    assert "not installed: torch" in line
    assert "pip install '.[model]'" in line


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed_version", lambda _name: "0.1")
    lines = wrong([*check_extras()])
    assert any("torch 0.1 is not ==2.13.0" in line for line in lines)


def test_it_runs_where_no_extra_is_installed(tmp_path: Path, free_ports: FreePorts) -> None:
    command = "from chasqui.cli.main import main; main()"
    done = subprocess.run(
        # -S: without the packages of this environment.
        [sys.executable, "-S", "-c", command, "doctor", *free_ports.flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(client_environment(tmp_path))},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "[model]      not installed:" in done.stdout
    assert "torch" in done.stdout
    assert "kernels are unknown without PyTorch" in done.stdout
    assert free_ports.are_fine_in(done.stdout)


def client_environment(folder: Path) -> Path:
    """A folder with links to the sources, and to the packages that the client alone needs."""
    site = folder / "site"
    site.mkdir()
    root = GOLDEN.parents[1]
    for name in ("chasqui", "client", "demo", "llama", "model_service", "serving"):
        (site / name).symlink_to(root / name)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pending = [Requirement(line) for line in project["dependencies"]]
    linked = {link_distribution("chasqui-llama", site).name}
    while pending:
        requirement = pending.pop()
        if requirement.name in linked or (requirement.marker and not requirement.marker.evaluate()):
            continue
        linked.add(requirement.name)
        distribution = link_distribution(requirement.name, site)
        pending += map(Requirement, distribution.requires or ())
    return site


def link_distribution(name: str, site: Path) -> importlib.metadata.Distribution:
    """Links the files of an installed package."""
    distribution = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return distribution


def test_a_missing_compiler_is_a_note_on_the_kernels() -> None:
    described = {"instructions": "avx512 vnni bf16", "without_kernels": "they were not compiled"}
    found = machine._processor(described)
    assert found.verdict is Verdict.NOTE
    assert "own kernels (they were not compiled)" in found.text
    found = machine._processor(described | {"without_kernels": ""})
    assert found.verdict is Verdict.FINE
    assert "this package's own compute bfloat16" in found.text
