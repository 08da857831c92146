"""Services as child processes: they start together, fail aloud, and never outlive their starter."""

import asyncio
import ipaddress
import json
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from chasqui.cli.serve.deployment import Deployment, demonstration
from chasqui.cli.serve.supervisor import Supervisor
from chasqui.errors import SupervisorError
from client import AsyncClient, Client, FinishReason, UnreachableError
from client.results import Finished

Serve = Callable[..., Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def descendants(process: "subprocess.Popen[str] | None" = None) -> list[psutil.Process]:
    """All below a process, or below this one."""
    return psutil.Process(None if process is None else process.pid).children(recursive=True)


def children(process: "subprocess.Popen[str] | None" = None) -> list[psutil.Process]:
    """Its services alone: their own children have their command line until they run another."""
    return psutil.Process(None if process is None else process.pid).children()


def listening(process: psutil.Process) -> list[str]:
    """Where it listens; IPv4 addresses without the form that IPv6 sockets show them in."""
    connections = process.net_connections("inet")
    ips = [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
    return [ip.removeprefix("::ffff:") for ip in ips]


def all_end(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not alive


def test_settings_become_flags() -> None:
    settings = {"dtype": "float32", "prefix_cache": True, "verify_checkpoint": False}
    command = Deployment(Path("weights"), Path(), model_settings=settings).model_command()
    assert {"--dtype=float32", "--prefix_cache", "--no-verify_checkpoint"} <= set(command)
    assert not any(flag.startswith("--model_name") for flag in command)


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chasqui.cli.serve.supervisor.EXTRAS", {"model": "no_such_module"})
    services = Supervisor(Deployment(Path(), Path()), log=lambda *_: None)

    with pytest.raises(SupervisorError, match=r"\(missing: model\): run pip install '\.\[all\]'"):
        asyncio.run(services.start())


def test_variables_that_would_hold_for_all_services_are_refused(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setenv("CHASQUI_TLS_KEY", "key.pem")
    monkeypatch.setenv("CHASQUI_TLS_CERT", "cert.pem")

    done = run("serve", "--port=0")

    assert done.returncode == 1
    assert "CHASQUI_TLS_CERT, CHASQUI_TLS_KEY would apply to all services" in done.stderr


def test_services_log_what_is_read_here_and_get_the_grace_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHASQUI_GRACE_PERIOD", "120")
    monkeypatch.setenv("CHASQUI_LOG_LEVEL", "error")
    deployment = Deployment(Path(), Path())
    for command in (
        deployment.tokenizer_command(),
        deployment.model_command(),
        deployment.safety_command(),
        deployment.gateway_command("tokenizer", ["model"]),
    ):
        assert {"--grace_period=120.0", "--log_level=info", "--log_format=json"} <= set(command)
    assert Supervisor(deployment, log=lambda *_: None).stop_seconds > 120


@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_a_grace_period_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, run: Run, value: str
) -> None:
    monkeypatch.setenv("CHASQUI_GRACE_PERIOD", value)
    done = run("serve", "--port=0")
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: CHASQUI_GRACE_PERIOD must be a number of seconds, 0 or more, not '{value}'\n"
    )


def test_log_file_that_cannot_be_written_is_named_with_its_flag(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "missing" / "log"
    done = run("serve", "--port=0", f"--log_file={file}")
    assert done.returncode == 1
    assert done.stderr == (f"Error: cannot write to --log_file {file}: No such file or directory\n")


@pytest.mark.parametrize(("flag", "others"), [("--port", []), ("--http_port", ["--port=0"])])
def test_port_that_is_taken_is_refused_before_any_service_starts(
    run: Run, tmp_path: Path, flag: str, others: list[str]
) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", f"{flag}={port}", *others, f"--log_file={log}")

    assert done.returncode == 1
    assert done.stderr == (
        f"Error: cannot listen on 127.0.0.1:{port}: Address already in use; "
        f"choose another address with --host or another port with {flag}\n"
    )
    assert not log.read_text()


def test_one_port_for_both_protocols_is_refused_before_any_service_starts(
    run: Run, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = run("serve", f"--port={port}", f"--http_port={port}", f"--log_file={log}")
    assert done.returncode == 1
    assert f"Error: --port and --http_port are both {port}; choose another port" in done.stderr
    assert not log.read_text()


def test_replicas_share_the_cores() -> None:
    one = Deployment(Path("ckpt"), Path("t.model")).model_command()
    many = Deployment(Path("ckpt"), Path("t.model"), shards=2, replicas=2).model_command()

    assert "--shards=2" in many
    assert any(flag.startswith("--threads=") for flag in many)
    assert not any(flag.startswith("--threads=") for flag in one)


def test_a_service_that_cannot_start_is_named_with_its_reason(run: Run, tmp_path: Path) -> None:
    tokenizer = Path(__file__).parents[2] / "golden" / "tokenizer.model"
    (tmp_path / "params.json").write_text("no JSON")
    flags = (f"--ckpt_dir={tmp_path}", f"--tokenizer_path={tokenizer}", "--port=0")

    done = run("serve", *flags, f"--log_file={tmp_path / 'log'}")

    assert done.returncode == 1
    assert "Error: model-1 ended with status 1" in done.stderr
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize(
    ("name", "problem"),
    [("README.md", "is a file of a kind that is not read"), ("docs", "holds no checkpoint")],
)
def test_a_path_without_a_checkpoint_is_refused_at_once(run: Run, name: str, problem: str) -> None:
    path = Path(__file__).parents[3] / name
    result = run("serve", "--port", "0", "--ckpt_dir", str(path))
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: --ckpt_dir: {path} {problem}; name a folder with")


def test_a_tokenizer_that_does_not_belong_to_the_checkpoint_is_named(run: Run) -> None:
    root = Path(__file__).parents[3]
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
    assert "Error: tokenizer was killed by SIGKILL: " in stderr
    assert '{"service": "gateway", "' in (tmp_path / "log").read_text()
    assert all_end(services)
    with Client(address) as client, pytest.raises(UnreachableError):
        client.get_model()


def test_a_replica_that_dies_is_started_again_and_answers_go_on(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHASQUI_FAILOVER_TIMEOUT", "200")
    with serve() as (process, address), Client(address) as client:
        [model] = [
            each
            for each in psutil.Process(process.pid).children()
            if "model_service" in each.cmdline()
        ]
        stream = client.complete_stream("The", max_gen_len=200, ignore_eos=True)
        next(stream)
        model.kill()
        *_, finished = stream
        services = descendants(process)
        process.terminate()
        process.communicate()

    assert isinstance(finished, Finished)
    assert finished.usage.completion_tokens == 200
    assert "model-1 was killed by SIGKILL: " in (tmp_path / "log").read_text()
    assert process.returncode == 0
    assert all_end(services)


async def test_a_replica_that_hangs_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chasqui.cli.serve.liveness.PERIOD", 0.5)
    monkeypatch.setattr("chasqui.cli.serve.liveness.MAX_UNANSWERED", 1)
    monkeypatch.setenv("CHASQUI_FAILOVER_TIMEOUT", "200")
    lines: list[str] = []
    others = children()
    services = Supervisor(demonstration(), log=lambda *line: lines.append(" ".join(line)))
    try:
        address = await services.start()
        watching = asyncio.create_task(services.watch())
        started = [each for each in children() if each not in others]
        [model] = [each for each in started if "model_service" in each.cmdline()]
        model.suspend()
        async with AsyncClient(address) as client:
            text = await client.complete("Llamas", max_gen_len=3)  # waits for the new one
        watching.cancel()
    finally:
        await services.stop()

    assert text.usage.completion_tokens > 0
    [restart] = [line for line in lines if "it is restarted" in line]
    assert "model-1 was killed, because it left 1 health checks in a row unanswered" in restart
    assert not model.is_running()


def test_the_wait_for_a_hung_service_is_explained_and_a_second_ctrl_c_ends_it(
    serve: Serve,
) -> None:
    with serve("--shards=2") as (process, _):
        services = descendants(process)
        [leader] = [each for each in services if each.environ().get("RANK") == "0"]
        leader.suspend()
        process.send_signal(signal.SIGINT)
        stopping = "Stopping: running answers get 30 s. Ctrl-C again ends all at once.\n"
        assert stopping in iter(process.stdout.readline, "")
        explanation = "Waiting for model-1 to end. Ctrl-C again ends all at once.\n"
        assert explanation in iter(process.stderr.readline, "")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()

    assert process.returncode == 0
    assert stderr == "Had to be killed: model-1.\n"
    assert all_end(services)


def test_in_json_all_lines_are_objects_and_the_access_log_is_among_them(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHASQUI_LOG_FORMAT", "json")
    with serve() as (process, address):
        with Client(address) as client:
            client.complete("The", max_gen_len=3)
        services = descendants(process)
        [tokenizer] = [each for each in services if "tokenizer_service" in each.cmdline()]
        tokenizer.kill()
        stderr = process.communicate()[1]

    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    [access] = [each for each in logged if each.get("logger") == "access"]
    assert (access["service"], access["method"]) == ("gateway", "TextComplete")
    [*_, error] = map(json.loads, stderr.splitlines())
    assert (error["service"], error["level"]) == ("serve", "critical")
    assert error["event"].startswith("tokenizer was killed by SIGKILL: ")


def test_shards_and_replicas_listen_on_loopback_alone_and_stop_cleanly(
    serve: Serve,
) -> None:
    with serve("--shards=2", "--replicas=2") as (process, address):
        with Client(address) as client:
            # The gateway serves as soon as it has reached one of them.
            while (model := client.get_model()).replicas < 2:
                pass
        services = descendants(process)
        addresses = [where for each in services for where in listening(each)]
        process.terminate()
        _, stderr = process.communicate()

    assert (model.shards, model.replicas) == (2, 2)
    assert len(addresses) > 4  # the gateway, the tokenizer service, two leaders, and all ranks
    assert all(ipaddress.ip_address(each).is_loopback for each in addresses)
    assert process.returncode == 0
    assert "Error" not in stderr
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
        page = process.stdout.readline().removeprefix("Chat page: ").partition(". ")[0]
        assert b"<title>Chasqui</title>" in urlopen(page).read()
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
    assert unsafe.text == "I apologize, but I cannot fulfill your request."
    assert (unsafe.finish_reason, unsafe.safety_categories) == (FinishReason.SAFETY, ("weapons",))
    assert unsafe.usage.completion_tokens == 0
    assert safe.usage.completion_tokens > 0


def test_a_killed_supervisor_leaves_no_service_behind(serve: Serve) -> None:
    with serve("--shards=2") as (process, _):
        services = descendants(process)
        [leader] = [each for each in services if each.environ().get("RANK") == "0"]
        leader.suspend()  # what hangs ends, too
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
    assert done.stderr == "starting the services with chasqui-demo …\n"
    with Client(target) as client, pytest.raises(UnreachableError):
        client.get_model()
