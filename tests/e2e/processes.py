"""Each service as a process, found by the address that it logs."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

GOLDEN = Path(__file__).parents[1] / "golden"
CONTEXT_LENGTH = 256  # of the golden cases
TIMEOUT = 120.0  # seconds, on a busy machine

running: list["ServiceProcess"] = []
ended: deque["ServiceProcess"] = deque(maxlen=8)


def wait_until(address: str, serving: bool) -> None:
    """Waits for the health service there to say so."""
    wanted = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for response in stub.Watch(HealthCheckRequest(), timeout=TIMEOUT):
            if response.status == wanted:
                return


@dataclass(frozen=True, slots=True)
class Scrape:
    """The metrics of a service at one moment."""

    families: list[Metric]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels; 0 where there is none."""
        samples = (sample for family in self.families for sample in family.samples)
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


class ServiceProcess:
    """A service as a process; a thread reads what it logs."""

    def __init__(self, name: str, *command: object, **flags: object) -> None:
        self.name = name
        self.log: list[str] = []
        self._address: Future[str] = Future()
        self._metrics_address: Future[str] = Future()
        self._terminated = False
        self._command, self._flags = command, flags
        flags = {"port": 0, "metrics_port": 0, "log_format": "json", **flags}
        arguments = [
            f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()
        ]
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        running.append(self)

    @property
    def address(self) -> str:
        """Where it listens, as soon as it does."""
        return self._address.result(TIMEOUT)

    @property
    def http_url(self) -> str:
        """Where a gateway serves HTTP."""
        _ = self.address  # logged after the other one
        [line] = [json.loads(line) for line in self.log if '"event": "serving HTTP"' in line]
        return f"http://{line['http_address']}"

    def scrape(self) -> Scrape:
        """Its metrics now."""
        with urlopen(f"http://{self._metrics_address.result(TIMEOUT)}/metrics") as response:
            text = response.read().decode()
        return Scrape([*text_string_to_metric_families(text)])

    def wait_until(self, serving: bool) -> None:
        """Waits for its health service to say so."""
        wait_until(self.address, serving)

    def inspect(self) -> psutil.Process:
        """To look at it from outside."""
        return psutil.Process(self._process.pid)

    @property
    def resident_bytes(self) -> int:
        """Its memory; fails when it has died."""
        resident: int = self.inspect().memory_info().rss
        return resident

    def terminate(self) -> None:
        """Asks it to end, once: a second signal would not let it drain."""
        if not self._terminated:
            self._terminated = True
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # where a test has stopped it

    def send(self, signum: signal.Signals, rank: int | None = None) -> None:
        """Sends a signal to it, or to the process of one of its shards."""
        if rank is None:
            self._process.send_signal(signum)
            return
        [shard] = [
            child for child in self.inspect().children() if child.environ().get("RANK") == str(rank)
        ]
        shard.send_signal(signum)

    @contextmanager
    def again(self) -> Iterator["ServiceProcess"]:
        """After its end: the same service at the same address, until the block ends."""
        flags = {**self._flags, "port": self.address.rpartition(":")[2]}
        if self.name == "gateway":
            flags["http_port"] = self.http_url.rpartition(":")[2]
        process = ServiceProcess(self.name, *self._command, **flags)
        try:
            yield process
        finally:
            process.stop()

    def kill(self) -> None:
        """Ends it without a warning."""
        self._terminated = True
        os.killpg(self._process.pid, signal.SIGKILL)
        self.stop()

    def wait(self) -> int:
        """Its exit status, when it has ended by itself."""
        return self._process.wait(TIMEOUT)

    def stop(self) -> int:
        """Ends it; returns its exit status."""
        self.terminate()
        try:
            return self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        finally:
            self._reader.join()
            if self in running:
                running.remove(self)
            ended.append(self)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if '"event": "serving metrics"' in line and not self._metrics_address.done():
                self._metrics_address.set_result(json.loads(line)["address"])
            if '"event": "listening"' in line and not self._address.done():
                self._address.set_result(json.loads(line)["address"])
        if not self._address.done():
            self._address.set_exception(RuntimeError(f"{self.name} ended before it listened"))


def start_tokenizer(**flags: object) -> ServiceProcess:
    flags = {"tokenizer_path": GOLDEN / "tokenizer.model", **flags}
    return ServiceProcess("tokenizer_service", "-m", "tokenizer_service", **flags)


def start_model(checkpoint: str, shards: int, **flags: object) -> ServiceProcess:
    flags = {"max_seq_len": CONTEXT_LENGTH, "threads": 1, "shards": shards, **flags}
    return ServiceProcess(
        "model_service",
        *("-m", "model_service"),
        ckpt_dir=GOLDEN / "checkpoints" / checkpoint,
        tokenizer_path=GOLDEN / "tokenizer.model",
        **flags,
    )


def start_gateway(
    tokenizer: ServiceProcess, *models: ServiceProcess, **flags: object
) -> ServiceProcess:
    return ServiceProcess(
        "gateway",
        *("-m", "gateway"),
        tokenizer_target=tokenizer.address,
        model_targets=",".join(model.address for model in models),
        **flags,
    )
