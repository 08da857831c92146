"""Services that belong together: a stack, a fleet of replicas and gateways, one behind locks."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import trustme

from client import Client, Tls
from llama.v1 import chat_pb2, chat_pb2_grpc
from tests.e2e.processes import (
    CONTEXT_LENGTH,
    ServiceProcess,
    start_gateway,
    start_model,
    start_tokenizer,
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path

    @classmethod
    def issue(cls, authority: trustme.CA, folder: Path, **attributes: Any) -> "Certificate":
        issued = authority.issue_cert("localhost", "127.0.0.1", **attributes)
        name = uuid.uuid4().hex
        files = cls(folder / f"{name}.cert.pem", folder / f"{name}.key.pem")
        files.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        files.key.write_bytes(issued.private_key_pem.bytes())
        return files

    def tls(self, ca: Path) -> Tls:
        return Tls(ca, self.cert, self.key)


@dataclass(frozen=True, slots=True)
class LockedGateway:
    """A gateway that asks for a client certificate and an API key, and what opens it."""

    process: ServiceProcess
    authority: trustme.CA
    ca: Path
    tls: Tls
    key: str

    def client(self) -> Client:
        return Client(self.process.address, tls=self.tls, api_key=self.key)

    @property
    def health_address(self) -> str:
        lines = (json.loads(line) for line in self.process.log if '"health_address"' in line)
        return str(next(lines)["health_address"])

    @property
    def port(self) -> int:
        return int(self.process.address.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class Stack:
    """All services, serving."""

    tokenizer: ServiceProcess
    model: ServiceProcess
    gateway: ServiceProcess


@dataclass(frozen=True, slots=True)
class Fleet:
    """All services, serving, with several replicas and perhaps several gateways."""

    tokenizer: ServiceProcess
    models: list[ServiceProcess]
    gateways: list[ServiceProcess]

    @property
    def gateway(self) -> ServiceProcess:
        return self.gateways[0]

    def wait_for_replicas(self, count: int) -> None:
        """Waits until every gateway sees so many."""
        for gateway in self.gateways:
            with grpc.insecure_channel(gateway.address) as channel:
                stub = chat_pb2_grpc.ChatServiceStub(channel)
                # The session of a replica that serves is about to begin; nothing tells when it has.
                while _replicas(stub) < count:
                    time.sleep(0.05)


def _replicas(stub: "chat_pb2_grpc.ChatServiceStub") -> int:
    try:
        return stub.GetModel(chat_pb2.GetModelRequest(), wait_for_ready=True).replicas
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return 0


@contextmanager
def run_fleet(
    replicas: int,
    shards: int = 1,
    gateways: int = 1,
    context_length: int = CONTEXT_LENGTH,
    model_flags: Mapping[str, object] = MappingProxyType({}),
    checkpoint: str = "gqa-mp1",
    **gateway_flags: object,
) -> Iterator[Fleet]:
    """Replicas of one checkpoint behind gateways, until the block ends."""
    with ExitStack() as ending:

        def started(process: ServiceProcess) -> ServiceProcess:
            ending.callback(process.stop)
            return process

        flags = {"max_batch_size": 64, "max_seq_len": context_length, **model_flags}
        models = [started(start_model(checkpoint, shards, **flags)) for _ in range(replicas)]
        tokenizer = started(start_tokenizer())
        front = [
            started(start_gateway(tokenizer, *models, **gateway_flags)) for _ in range(gateways)
        ]
        fleet = Fleet(tokenizer, models, front)
        fleet.wait_for_replicas(replicas)
        yield fleet


@contextmanager
def run_services(
    checkpoint: str,
    shards: int = 1,
    every: Mapping[str, object] = MappingProxyType({}),
    **model_flags: object,
) -> Iterator[Stack]:
    """All services on one checkpoint, until the block ends; `every` is flags of each of them."""
    with ExitStack() as ending:

        def started(process: ServiceProcess) -> ServiceProcess:
            ending.callback(process.stop)
            return process

        model = started(start_model(checkpoint, shards, **model_flags, **every))
        tokenizer = started(start_tokenizer(**every))
        gateway = started(start_gateway(tokenizer, model, **every))
        gateway.wait_until(serving=True)
        yield Stack(tokenizer, model, gateway)
