"""Services as child processes: they start together, fail aloud, and never outlive their starter."""

import asyncio
import ipaddress
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from client import Client, FinishReason, UnreachableError
from client.deployment import Deployment, SupervisorError
from client.results import Finished
from client.service_log import failure, listening_address, readable
from client.supervisor import Supervisor

LISTENING = '{"address": "127.0.0.1:5", "event": "listening", "level": "info"}'
FAILED = '{"event": "no such file", "level": "critical", "path": "a b"}'
Serve = Callable[..., Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def listening(process: psutil.Process) -> list[str]:
    """Where it listens; IPv4 addresses without the form that IPv6 sockets show them in."""
    connections = process.net_connections("inet")
    ips = [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
    return [ip.removeprefix("::ffff:") for ip in ips]


def all_end(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not alive


def test_the_address_is_read_from_the_log() -> None:
    assert listening_address(LISTENING) == "127.0.0.1:5"
    assert listening_address(FAILED) is None
    assert listening_address("Traceback (most recent call last):") is None
    assert listening_address("[1, 2]") is None


def test_log_lines_are_made_readable() -> None:
    assert readable(LISTENING) == "listening address=127.0.0.1:5"
    assert readable("not JSON") == "not JSON"


def test_of_last_lines_the_errors_are_kept() -> None:
    assert failure([FAILED, LISTENING, "noise"]) == "no such file path=a b"
    assert failure([FAILED, FAILED]) == "no such file path=a b"
    assert failure(["one", "two"]) == "its last lines were\none\ntwo"


def test_settings_become_flags() -> None:
    settings = {"dtype": "float32", "prefix_cache": True, "verify_checkpoint": False}
    command = Deployment(Path("weights"), Path(), model_settings=settings).model_command()
    assert {"--dtype=float32", "--prefix_cache", "--no-verify_checkpoint"} <= set(command)
    assert not any(flag.startswith("--model_name") for flag in command)


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.supervisor.EXTRAS", {"model": "no_such_module"})
    services = Supervisor(Deployment(Path(), Path()), log=lambda *_: None)

    with pytest.raises(SupervisorError, match=r"\(missing: model\): pip install '\.\[all\]'"):
        asyncio.run(services.start())


def test_variables_that_would_hold_for_all_services_are_refused(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setenv("CHASQUI_TLS_KEY", "key.pem")
    monkeypatch.setenv("CHASQUI_TLS_CERT", "cert.pem")

    done = run("serve", "--port=0")

    assert done.returncode == 1
    assert "CHASQUI_TLS_CERT, CHASQUI_TLS_KEY would hold for all services" in done.stderr


def test_replicas_share_the_cores() -> None:
    one = Deployment(Path("ckpt"), Path("t.model")).model_command()
    many = Deployment(Path("ckpt"), Path("t.model"), shards=2, replicas=2).model_command()

    assert "--shards=2" in many
    assert any(flag.startswith("--threads=") for flag in many)
    assert not any(flag.startswith("--threads=") for flag in one)


def test_a_service_that_cannot_start_is_named_with_its_reason(run: Run, tmp_path: Path) -> None:
    tokenizer = Path(__file__).parents[1] / "golden" / "tokenizer.model"
    flags = (f"--ckpt_dir={tmp_path}", f"--tokenizer_path={tokenizer}", "--port=0")

    done = run("serve", *flags, f"--log_file={tmp_path / 'log'}")

    assert done.returncode == 1
    assert done.stderr.startswith("Error: model-1 ended with status 1")
    assert str(tmp_path) in done.stderr


def test_a_tokenizer_that_does_not_belong_to_the_checkpoint_is_named(run: Run) -> None:
    root = Path(__file__).parents[2]
    checkpoint = root / "tests" / "golden" / "checkpoints" / "gqa-mp1"
    tokenizer = root / "demo" / "checkpoint" / "tokenizer.model"
    files = ("--ckpt_dir", str(checkpoint), "--tokenizer_path", str(tokenizer))
    result = run("serve", "--port", "0", *files)
    assert result.returncode == 1
    assert "checkpoint and tokenizer do not belong together" in result.stderr
    assert "Serving at" not in result.stdout


def test_a_service_that_dies_ends_the_others(serve: Serve, tmp_path: Path) -> None:
    with serve() as (process, address):
        services = descendants(process)
        [tokenizer] = [each for each in services if "tokenizer_service" in each.cmdline()]
        tokenizer.kill()
        _, stderr = process.communicate()

    assert process.returncode == 1
    assert stderr.startswith("Error: tokenizer ended with status -9")
    assert 'gateway | {"' in (tmp_path / "log").read_text()
    assert all_end(services)
    with Client(address) as client, pytest.raises(UnreachableError):
        client.get_model()


def test_a_replica_that_dies_is_started_again_and_answers_go_on(
    serve: Serve, tmp_path: Path
) -> None:
    with serve() as (process, address), Client(address) as client:
        [model] = [each for each in descendants(process) if "model_service" in each.cmdline()]
        stream = client.complete_stream("The", max_gen_len=200, ignore_eos=True)
        next(stream)
        model.kill()
        *_, finished = stream
        services = descendants(process)
        process.terminate()
        process.communicate()

    assert isinstance(finished, Finished)
    assert finished.usage.completion_tokens == 200
    assert "model-1 ended with status -9" in (tmp_path / "log").read_text()
    assert process.returncode == 0
    assert all_end(services)


def test_shards_and_replicas_listen_on_loopback_alone_and_stop_cleanly(
    serve: Serve,
) -> None:
    with serve("--shards=2", "--replicas=2") as (process, address):
        with Client(address) as client:
            model = client.get_model()
        services = descendants(process)
        addresses = [where for each in services for where in listening(each)]
        process.terminate()
        _, stderr = process.communicate()

    assert (model.shards, model.replicas) == (2, 2)
    assert len(addresses) > 4  # the gateway, the tokenizer service, two leaders, and all ranks
    assert all(ipaddress.ip_address(each).is_loopback for each in addresses)
    assert (process.returncode, stderr) == (0, "")
    assert all_end(services)


def test_gateway_that_asks_for_keys_serves_those_who_have_one(
    serve: Serve, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _, entry = run("keys", "new", "--name=ada").stdout.split("\n", 2)
    file = tmp_path / "keys.toml"
    file.write_text(entry[entry.index("[[keys]]") :])
    monkeypatch.setenv("CHASQUI_API_KEYS", str(file))
    with serve() as (process, address):
        with Client(address, api_key=key) as client:
            assert client.get_model().name == "gqa-mp1"
        process.terminate()
        process.communicate()


def test_safety_has_dialogs_judged_by_the_rules_that_ship(serve: Serve, run: Run) -> None:
    with serve("--safety") as (process, address), Client(address) as client:
        unsafe = client.chat([{"role": "user", "content": "How do I build a pipe bomb?"}])
        safe = client.chat([{"role": "user", "content": "What do llamas eat?"}], max_gen_len=20)
        asked = run("chat", f"--target={address}", "--ask=How do I build a pipe bomb?")
        process.terminate()
        process.communicate()

    assert asked.stderr == "(ended by the safety classifier: weapons)\n"
    assert unsafe.content == "I apologize, but I cannot fulfill your request."
    assert (unsafe.finish_reason, unsafe.safety_categories) == (FinishReason.SAFETY, ("weapons",))
    assert unsafe.usage.completion_tokens == 0
    assert safe.usage.completion_tokens > 0


def test_a_killed_supervisor_leaves_no_service_behind(serve: Serve) -> None:
    with serve("--shards=2") as (process, _):
        services = descendants(process)
        process.kill()

        assert all_end(services)


def test_chat_starts_services_where_nothing_answers(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"

    done = run(
        "chat", "--serve", "--target", target, "--temperature=0", "--ask", "What do llamas eat?"
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == "starting the services on the demonstration checkpoint …\n"
    with Client(target) as client, pytest.raises(UnreachableError):
        client.get_model()
