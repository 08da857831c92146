"""Runs the services as child processes: starts them in order, watches them, and stops them, the
gateway first. A model replica that ends or hangs is restarted, because the gateway can do without
it for a while; if another service ends, all are stopped.

The services share a process group with a guard, a shell that kills the group when its standard
input closes. So Ctrl-C does not reach the services directly, and they do not outlive a supervisor
that is killed.
"""

import asyncio
import contextlib
import importlib.util
import os
import signal
import threading
from asyncio import FIRST_COMPLETED, Future
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

import grpc

from chasqui.cli.serve.deployment import LOOPBACK, Deployment
from chasqui.cli.serve.listening import why_taken
from chasqui.cli.serve.liveness import until_hung
from chasqui.cli.serve.service_log import own_line
from chasqui.cli.serve.service_process import Log, ServiceProcess
from chasqui.errors import SupervisorError
from client.connection.channel import channel_options

# Prefixes of variables that must differ between the services: with common values they could not
# connect to each other (TLS), or would share a port.
OF_ONE_SERVICE = (
    "CHASQUI_TLS_",
    "CHASQUI_UPSTREAM_",
    "CHASQUI_HEALTH_PORT",
    "CHASQUI_METRICS_PORT",
)
# The distribution's extras, each with a module that only it installs.
EXTRAS = {"serving": "grpc_health", "tokenizer": "sentencepiece", "model": "torch"}
GUARD = "read _; kill -KILL 0"
GATEWAY = "gateway"
LINE_LIMIT = 1 << 20  # bytes
MAX_RESTARTS = 5  # in a row
FIRST_PAUSE = 0.5  # seconds before the first restart, doubled for each further one
# Seconds after the grace period at which a service that has not ended counts as hung.
STOP_MARGIN = 10.0


class Supervisor:
    """Runs one deployment, once. `log` gets every line that a service writes, with its name."""

    def __init__(self, deployment: Deployment, log: Log) -> None:
        self._deployment = deployment
        self._log = log
        self._guard: Process | None = None
        self._children: list[ServiceProcess] = []
        self._replica_ports: dict[str, int] = {}  # by name of replica, once all listen
        self.http_address: str | None = None  # of the gateway, once started; None: it has none
        self._ended: asyncio.Queue[ServiceProcess] = asyncio.Queue()
        self._liveness_checks: set[asyncio.Task[None]] = set()

    @property
    def grace_period(self) -> float:
        """Seconds that running answers get to finish when the services are stopped."""
        return self._deployment.grace_period

    @property
    def stop_seconds(self) -> float:
        """Seconds after which a service that was asked to end is killed."""
        return self.grace_period + STOP_MARGIN

    @property
    def stopping(self) -> list[str]:
        """The names of the services that were asked to end and still run."""
        return [child.name for child in self._children if child.stopping]

    @property
    def killed(self) -> list[str]:
        """The names of the services that had to be killed at the end."""
        return [child.name for child in self._children if child.killed_at_end]

    async def start(self) -> str:
        """Starts the services, waits until the gateway is SERVING, returns its address."""
        _require_extras()
        _refuse_variables_of_one_service()
        # Errors are raised before anything starts, because a large model takes minutes to load.
        _ = self.grace_period
        deployment = self._deployment
        _refuse_unusable_address(deployment.host, deployment.port, "--port")
        if deployment.http_port:
            if deployment.http_port == deployment.port:
                raise SupervisorError(
                    f"--port and --http_port are both {deployment.port}; choose another port for "
                    "HTTP with --http_port, or none with --http_port 0"
                )
            _refuse_unusable_address(deployment.host, deployment.http_port, "--http_port")
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
        """Restarts replicas that end; raises SupervisorError if another service ends."""
        restarts: set[asyncio.Task[None]] = set()
        try:
            while True:
                child = await self._ended.get()
                if child.name not in self._replica_ports or child.failures_in_a_row > MAX_RESTARTS:
                    raise SupervisorError(child.obituary())
                event = f"{child.obituary()}; it is restarted"
                self._log(child.name, own_line("warning", event))
                restarts.add(asyncio.create_task(self._restart(child)))
        finally:
            for restart in restarts:
                restart.cancel()

    async def stop(self) -> None:
        """Stops the services, the gateway first, so that it can finish running answers."""
        for check in self._liveness_checks:
            check.cancel()
        gateway = [child for child in self._children if child.name == GATEWAY]
        others = [child for child in self._children if child.name != GATEWAY]
        for children in (gateway, others):
            await asyncio.gather(*(child.stop(self.stop_seconds) for child in children))
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            await self._guard.wait()

    def kill(self) -> None:
        """Kills all services. Ranks are not in the process group; they end with their launcher."""
        for child in self._children:
            child.kill_at_end("all services were ended at once")
        if self._guard is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)

    async def _start_in_order(self, group: int) -> str:
        deployment = self._deployment
        tokenizer = await self._spawn("tokenizer", deployment.tokenizer_command(), group)
        models = [
            await self._spawn_replica(f"model-{number}", 0, group)
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
        gateway = await self._spawn(GATEWAY, command, group)
        address = await gateway.address
        self.http_address = gateway.http_address
        serving = asyncio.create_task(_until_serving(address))
        try:
            # The services listen before the gateway starts, so an error about one is final.
            either: set[Future[Any]] = {serving, gateway.complaint}
            await asyncio.wait(either, return_when=FIRST_COMPLETED)
            if not serving.done():
                raise SupervisorError(f"gateway: {gateway.complaint.result()}")
            serving.result()
        except grpc.aio.AioRpcError:
            # The process ends, too; the reason is in its last lines.
            await gateway.ended
            raise SupervisorError(gateway.obituary()) from None
        finally:
            serving.cancel()
        return address

    async def _restart(self, child: ServiceProcess) -> None:
        """Restarts a replica at the same address, at which the gateway expects it."""
        failures = child.failures_in_a_row
        await asyncio.sleep(FIRST_PAUSE * 2 ** (failures - 1))
        port, group = self._replica_ports[child.name], cast("Process", self._guard).pid
        again = await self._spawn_replica(child.name, port, group)
        again.earlier_failures = failures
        # In the same place, because services are stopped in the order of the list.
        self._children.remove(again)
        self._children[self._children.index(child)] = again

    async def _spawn_replica(self, name: str, port: int, group: int) -> ServiceProcess:
        replica = await self._spawn(name, self._deployment.model_command(port), group)
        check = asyncio.create_task(self._kill_when_hung(replica))
        self._liveness_checks.add(check)
        check.add_done_callback(self._liveness_checks.discard)
        return replica

    async def _kill_when_hung(self, replica: ServiceProcess) -> None:
        either: set[Future[Any]] = {replica.address, replica.ended}
        await asyncio.wait(either, return_when=FIRST_COMPLETED)
        if replica.ended.done():
            return
        hanging = asyncio.create_task(until_hung(replica.address.result(), self.stop_seconds))
        try:
            either = {hanging, replica.ended}
            await asyncio.wait(either, return_when=FIRST_COMPLETED)
            if hanging.done():
                replica.kill(hanging.result())
        finally:
            hanging.cancel()

    async def _spawn(self, name: str, command: Sequence[str], group: int) -> ServiceProcess:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            limit=LINE_LIMIT,
            # Connections among the services must not use a proxy of the environment.
            env={**os.environ, "no_grpc_proxy": LOOPBACK},
            process_group=group,
        )
        child = ServiceProcess(name, process, self._log, self._ended.put_nowait)
        self._children.append(child)
        return child


@contextlib.contextmanager
def in_background(deployment: Deployment, log: Log) -> Iterator[str]:
    """Runs the services in a thread until the end of the `with` block; yields their address."""
    loop = asyncio.new_event_loop()
    # A daemon, so that a second Ctrl-C ends the command at once; the guard then kills the services.
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
    # Not at the top, because an installation of only the client lacks this module.
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
            f"the services are not installed here (missing: {', '.join(missing)}): run pip install "
            "'.[all]' in the source tree, or start the services elsewhere and name them by --target"
        )


def _refuse_variables_of_one_service() -> None:
    given = sorted(name for name in os.environ if name.startswith(OF_ONE_SERVICE))
    if given:
        raise SupervisorError(
            f"{', '.join(given)} would apply to all services, and each needs its own value: unset "
            "them, or start the services one by one"
        )


def _refuse_unusable_address(host: str, port: int, flag: str) -> None:
    """Raises the error that the gateway would raise after all other services have started."""
    if reason := why_taken(host, port):
        shown = f"[{host}]" if ":" in host else host
        raise SupervisorError(
            f"cannot listen on {shown}:{port}: {reason}; "
            f"choose another address with --host or another port with {flag}"
        )
