"""The services as child processes: started in order, watched, stopped in the opposite order. A
replica of the model that dies is started again, as the gateway does without it meanwhile; whatever
else dies ends them all.

They share a process group of their own with a guard, a shell that waits for the end of its standard
input. So Ctrl-C reaches the services only through here, and when this process is killed, the
guard's input ends and it terminates the group: no way of dying leaves a service behind.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import threading
import time
from asyncio import FIRST_COMPLETED, Future
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, cast

import grpc

from client.channel import channel_options

# How variables begin that each service needs for itself: with one for all they would not find each
# other (TLS), or share a port.
OF_ONE_SERVICE = ("CHASQUI_TLS_", "CHASQUI_PEER_", "CHASQUI_HEALTH_PORT", "CHASQUI_METRICS_PORT")
# The distribution's extras, each with a module that it alone brings.
EXTRAS = {"serving": "grpc_health", "tokenizer": "sentencepiece", "model": "torch"}
GUARD = "read _; kill -TERM 0"
LOOPBACK = "127.0.0.1"
LINES_KEPT = 200
LINE_LIMIT = 1 << 20  # bytes
# A replica that lived for so long is not counted as one that cannot live, in seconds.
SETTLED = 60.0
MOST_RESTARTS = 5  # in a row
FIRST_PAUSE = 0.5  # seconds before the first restart; each further one waits twice as long
# More than the services' grace period: what has not ended by then hangs.
STOP_SECONDS = 60.0

Log = Callable[[str, str], None]


class SupervisorError(Exception):
    """The services cannot start, or one of them ended by itself."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What to serve on this machine; `model_settings` are flags of the model service by name."""

    ckpt_dir: Path
    tokenizer_path: Path
    model_name: str | None = None
    shards: int = 1
    replicas: int = 1
    host: str = LOOPBACK
    port: int = 0
    safety: bool = False  # whether dialogs and answers are judged, by the rules that ship
    model_settings: Mapping[str, object] = field(default_factory=dict)

    def tokenizer_command(self) -> list[str]:
        return service_command("tokenizer_service", port=0, tokenizer_path=self.tokenizer_path)

    def model_command(self, port: int = 0) -> list[str]:
        # A model takes all cores unless told that it shares them.
        share = max(1, (os.cpu_count() or 1) // (self.shards * self.replicas))
        return service_command(
            "model_service",
            port=port,
            shards=self.shards,
            ckpt_dir=self.ckpt_dir,
            tokenizer_path=self.tokenizer_path,
            model_name=self.model_name,
            threads=share if self.replicas > 1 else None,
            **self.model_settings,
        )

    def safety_command(self) -> list[str]:
        return service_command("safety_service", port=0)

    def gateway_command(
        self, tokenizer: str, models: Sequence[str], safety: str | None = None
    ) -> list[str]:
        return service_command(
            "gateway",
            host=self.host,
            port=self.port,
            tokenizer_target=tokenizer,
            model_targets=",".join(models),
            safety_target=safety,
        )


def demonstration() -> Deployment:
    """The checkpoint that comes with the distribution."""
    folder = Path(str(resources.files("demo") / "checkpoint"))
    if not folder.is_dir():
        raise SupervisorError(f"the demonstration checkpoint is missing: no folder {folder}")
    return Deployment(folder, folder / "tokenizer.model", model_name="chasqui-demo")


def service_command(module: str, **flags: object) -> list[str]:
    """How to run a service so that `listening_address` can read its log; None leaves a flag out.

    True and False become `--name` and `--no-name`, as the services want it.
    """
    flags = {"host": LOOPBACK, "log_format": "json", **flags}
    given = (_flag(name, value) for name, value in flags.items() if value is not None)
    return [sys.executable, "-m", module, *given]


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def listening_address(line: str) -> str | None:
    """The address in the log line by which a service says that it listens; None in any other."""
    record = _record(line)
    return str(record["address"]) if record.get("event") == "listening" else None


def readable(line: str) -> str:
    """A log line for people; what is not JSON (such as a traceback) stays."""
    record = _record(line)
    if "event" not in record:
        return line
    values = (
        f"{name}={value}"
        for name, value in record.items()
        if name not in ("event", "level", "logger", "timestamp")
    )
    return " ".join((str(record["event"]), *values))


def failure(lines: Sequence[str]) -> str:
    """Of a service's last lines, those that say why it ended; each once, as shards say it all."""
    errors = list(filter(_is_error, lines))
    if errors:
        return "\n".join(dict.fromkeys(map(readable, errors)))
    return "\n".join(("its last lines were", *map(readable, lines[-10:])))


class Supervisor:
    """Runs one deployment once. Every line that a service writes goes to `log`, with its name."""

    def __init__(self, deployment: Deployment, log: Log) -> None:
        self._deployment = deployment
        self._log = log
        self._guard: Process | None = None
        self._children: list[_Child] = []
        self._replica_ports: dict[str, int] = {}  # by the names of replicas, once they listen
        self._ended: asyncio.Queue[_Child] = asyncio.Queue()

    async def start(self) -> str:
        """Starts the services, waits until the gateway is SERVING, returns its address."""
        _require_extras()
        _refuse_variables_of_one_service()
        self._guard = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", GUARD, stdin=PIPE, process_group=0
        )
        starting = asyncio.create_task(self._start_in_order(self._guard.pid))
        watching = asyncio.create_task(self.watch())
        try:
            await asyncio.wait({starting, watching}, return_when=FIRST_COMPLETED)
            return await watching if watching.done() else starting.result()
        finally:
            starting.cancel()
            watching.cancel()

    async def watch(self) -> NoReturn:
        """Starts replicas that end by themselves again; raises why any other service ended."""
        restarts: set[asyncio.Task[None]] = set()
        try:
            while True:
                child = await self._ended.get()
                if child.name not in self._replica_ports or child.failures_in_a_row > MOST_RESTARTS:
                    raise SupervisorError(child.obituary())
                self._log(child.name, f"{child.obituary()}; it is started again")
                restarts.add(asyncio.create_task(self._restart(child)))
        finally:
            for restart in restarts:
                restart.cancel()

    async def stop(self) -> None:
        """Stops what runs. The gateway goes first, so that its answers can be finished."""
        for child in reversed(self._children):
            await child.stop()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            await self._guard.wait()

    def hurry(self) -> None:
        """Makes services that finish their last requests end at once: their second SIGTERM."""
        for child in self._children:
            child.terminate()

    async def _start_in_order(self, group: int) -> str:
        deployment = self._deployment
        tokenizer = await self._spawn("tokenizer", deployment.tokenizer_command(), group)
        models = [
            await self._spawn(f"model-{number}", deployment.model_command(), group)
            for number in range(1, deployment.replicas + 1)
        ]
        safety = None
        if deployment.safety:
            child = await self._spawn("safety", deployment.safety_command(), group)
            safety = await child.address
        targets = [await model.address for model in models]
        ports = (int(target.rpartition(":")[2]) for target in targets)
        self._replica_ports = dict(zip((model.name for model in models), ports, strict=True))
        command = deployment.gateway_command(await tokenizer.address, targets, safety)
        gateway = await self._spawn("gateway", command, group)
        address = await gateway.address
        serving = asyncio.create_task(_until_serving(address))
        try:
            # The services listen before the gateway starts: what it has against one will not pass.
            either: set[Future[Any]] = {serving, gateway.complaint}
            await asyncio.wait(either, return_when=FIRST_COMPLETED)
            if not serving.done():
                raise SupervisorError(f"gateway: {gateway.complaint.result()}")
            serving.result()
        except grpc.aio.AioRpcError:
            # Its process ends, too; the reason is in the last lines it wrote.
            await gateway.ended
            raise SupervisorError(gateway.obituary()) from None
        finally:
            serving.cancel()
        return address

    async def _restart(self, child: "_Child") -> None:
        """At the same address, where the gateway looks for it."""
        failures = child.failures_in_a_row
        await asyncio.sleep(FIRST_PAUSE * 2 ** (failures - 1))
        command = self._deployment.model_command(self._replica_ports[child.name])
        again = await self._spawn(child.name, command, cast("Process", self._guard).pid)
        again.earlier_failures = failures
        # In its place, as the order of the end is that of the list.
        self._children.remove(again)
        self._children[self._children.index(child)] = again

    async def _spawn(self, name: str, command: Sequence[str], group: int) -> "_Child":
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            limit=LINE_LIMIT,
            # They talk to each other on this machine: a proxy in the environment is not for them.
            env={**os.environ, "no_grpc_proxy": LOOPBACK},
            process_group=group,
        )
        child = _Child(name, process, self._log, self._ended.put_nowait)
        self._children.append(child)
        return child


class _Child:
    """One service's process.

    `address` is known when it listens, `complaint` when it has logged an error, and `ended` is done
    when it is gone.
    """

    def __init__(
        self, name: str, process: Process, log: Log, on_end: Callable[["_Child"], None]
    ) -> None:
        self.address: Future[str] = asyncio.get_running_loop().create_future()
        self.complaint: Future[str] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.create_task(self._follow(log, on_end))
        self.name = name
        self.earlier_failures = 0  # of those that it replaces, in a row
        self._started_at = time.monotonic()
        self._process = process
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)

    def obituary(self) -> str:
        reason = failure(list(self._lines))
        return f"{self.name} ended with status {self._process.returncode}: {reason}"

    @property
    def failures_in_a_row(self) -> int:
        """The end of the process itself included."""
        settled = time.monotonic() - self._started_at > SETTLED
        return 1 if settled else self.earlier_failures + 1

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def stop(self) -> None:
        self.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.ended
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _follow(self, log: Log, on_end: Callable[["_Child"], None]) -> None:
        async for line in cast("asyncio.StreamReader", self._process.stdout):
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            log(self.name, text)
            address = listening_address(text)
            if address is not None and not self.address.done():
                self.address.set_result(address)
            if _is_error(text) and not self.complaint.done():
                self.complaint.set_result(readable(text))
        await self._process.wait()
        on_end(self)


@contextlib.contextmanager
def in_background(deployment: Deployment, log: Log) -> Iterator[str]:
    """The services beside synchronous code: their address, until the end of the block."""
    loop = asyncio.new_event_loop()
    # A daemon, so that an impatient Ctrl-C while stopping is not held up; the guard does the rest.
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    supervisor = Supervisor(deployment, log)
    try:
        yield asyncio.run_coroutine_threadsafe(supervisor.start(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(supervisor.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _until_serving(address: str) -> None:
    # The client alone is installed without this module; `_require_extras` has seen that it is here.
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    async with grpc.aio.insecure_channel(address, channel_options(address)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        call = health.Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
        async for response in call:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


def _require_extras() -> None:
    missing = [extra for extra, module in EXTRAS.items() if not importlib.util.find_spec(module)]
    if missing:
        raise SupervisorError(
            f"the services are not installed here: install chasqui with its extras "
            f"{', '.join(missing)}, as pip install '.[all]' does in the source tree, or start the "
            "services elsewhere and name their --target"
        )


def _refuse_variables_of_one_service() -> None:
    given = sorted(name for name in os.environ if name.startswith(OF_ONE_SERVICE))
    if given:
        raise SupervisorError(
            f"{', '.join(given)} would hold for all services, and each needs its own: unset them, "
            "or start the services one by one"
        )


def _is_error(line: str) -> bool:
    return _record(line).get("level") in ("error", "critical")


def _record(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
