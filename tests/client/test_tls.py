"""Locked gateways, and what each of the clients says where the two sides do not agree on TLS."""

import asyncio
import datetime
import re
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import SHUT_RDWR, create_server
from typing import Any

import grpc
import pytest
import trustme

from client import (
    AsyncClient,
    ChasquiError,
    Client,
    ConnectionSettingsError,
    Message,
    Tls,
    UnreachableError,
)
from llama import Llama
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from tests.command import Run
from tests.scripted_gateway import handler

GetModel = Callable[[str, Tls | None], str]
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Files:
    """PEM files in a folder: NAME.pem and NAME.key of certificates, NAME-ca.pem of authorities."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def issue(self, authority: trustme.CA, name: str, *identities: str, **attributes: Any) -> None:
        issued = authority.issue_cert(*identities, **attributes)
        self[f"{name}.pem"].write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self[f"{name}.key"].write_bytes(issued.private_key_pem.bytes())

    def tls(self, ca: str = "our-ca.pem", cert: str | None = None, **more: Any) -> Tls:
        if cert is not None:
            more |= {"cert": self[f"{cert}.pem"], "key": self[f"{cert}.key"]}
        return Tls(ca=self[ca], **more)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("certificates"))
    ours, other = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(files["our-ca.pem"])
    other.cert_pem.write_to_path(files["other-ca.pem"])
    now = datetime.datetime.now(datetime.UTC)
    files.issue(ours, "gateway", "127.0.0.1")
    files.issue(ours, "elsewhere", "chat.example.org")
    files.issue(ours, "old", "127.0.0.1", not_before=now - 2 * DAY, not_after=now - DAY)
    files.issue(ours, "friend", "ada")
    files.issue(other, "stranger", "bob")
    return files


@pytest.fixture(scope="module")
def gateways(files: Files) -> Iterator[dict[str, str]]:
    """The addresses of gateways, by how they speak."""

    def get_model(_request: object, _context: object) -> chat_pb2.GetModelResponse:
        return chat_pb2.GetModelResponse(name="reached")

    def complete(
        request: chat_pb2.TextCompleteStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[chat_pb2.TextCompleteStreamResponse]:
        if ("authorization", "Bearer secret") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no key that is known")
        events: list[dict[str, Any]] = [
            {"started": chat_pb2.Started()},
            {"delta": chat_pb2.Delta(text=f"{request.prompts[0]}!")},
            {"finished": chat_pb2.Finished(finish_reason=FINISH_REASON_STOP)},
        ]
        for number, event in enumerate(events, start=1):
            numbered = chat_pb2.StreamEvent(event_number=number, **event)
            yield chat_pb2.TextCompleteStreamResponse(event=numbered)

    methods = {"GetModel": get_model, "TextCompleteStream": complete}
    handlers = {name: handler(name, behaviour) for name, behaviour in methods.items()}
    service = grpc.method_handlers_generic_handler("llama.v1.ChatService", handlers)

    def credentials(name: str, *, client_ca: bool = False) -> grpc.ServerCredentials:
        pair = files[f"{name}.key"].read_bytes(), files[f"{name}.pem"].read_bytes()
        authority = files["our-ca.pem"].read_bytes() if client_ca else None
        return grpc.ssl_server_credentials([pair], authority, client_ca)

    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((service,))
    secure = {name: credentials(name) for name in ("gateway", "elsewhere", "old")}
    secure["mutual"] = credentials("gateway", client_ca=True)
    ports = {name: server.add_secure_port("127.0.0.1:0", each) for name, each in secure.items()}
    ports["plaintext"] = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    server.stop(None).wait()


@pytest.fixture(params=["sync", "asyncio"])
def model_name(request: pytest.FixtureRequest) -> GetModel:
    """The name of the model at a target, by either client."""

    def with_sync(target: str, tls: Tls | None) -> str:
        with Client(target, tls=tls) as client:
            return client.get_model(timeout=30).name

    async def with_asyncio(target: str, tls: Tls | None) -> str:
        async with AsyncClient(target, tls=tls) as client:
            return (await client.get_model(timeout=30)).name

    return (
        with_sync
        if request.param == "sync"
        else lambda target, tls: asyncio.run(with_asyncio(target, tls))
    )


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A port that reads something of each connection, answers with these bytes, and closes it."""
    with create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(ConnectionError):
                        connection.recv(1024)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(SHUT_RDWR)


SPEAKS_TLS = "speaks TLS, and this client does not: give the client tls=Tls(ca=…), "
NOT_VALID = "shows a certificate that is not valid by the authorities in "
PROBLEMS = [
    ("gateway", None, SPEAKS_TLS),
    ("mutual", None, SPEAKS_TLS),
    ("plaintext", {}, "speaks plaintext, and this client TLS: leave out tls=, or --tls and --ca"),
    ("gateway", {"ca": "other-ca.pem"}, NOT_VALID),
    ("old", {}, NOT_VALID),
    ("elsewhere", {}, "shows a certificate for chat.example.org and not for 127.0.0.1: give one"),
    ("gateway", {"name": "ada"}, "shows a certificate for 127.0.0.1 and not for ada: give one"),
    ("mutual", {}, "it may ask for a certificate, and this client shows none; give it Tls(cert=…"),
    ("mutual", {"cert": "stranger"}, "it may not accept the certificate "),
]


@pytest.mark.parametrize(("gateway", "settings", "problem"), PROBLEMS)
def test_sides_that_do_not_agree_on_tls_are_told_apart(
    files: Files,
    gateways: dict[str, str],
    model_name: GetModel,
    gateway: str,
    settings: dict[str, str] | None,
    problem: str,
) -> None:
    target = gateways[gateway]
    with pytest.raises(ConnectionSettingsError, match=re.escape(problem)) as caught:
        model_name(target, None if settings is None else files.tls(**settings))
    assert str(caught.value).startswith(f"{target} ")


@pytest.mark.parametrize(
    ("gateway", "settings"),
    [
        ("plaintext", None),
        ("gateway", {}),
        ("elsewhere", {"name": "chat.example.org"}),
        ("mutual", {"cert": "friend"}),
    ],
)
def test_sides_that_agree_on_tls_reach_each_other(
    files: Files,
    gateways: dict[str, str],
    model_name: GetModel,
    gateway: str,
    settings: dict[str, str] | None,
) -> None:
    tls = None if settings is None else files.tls(**settings)
    assert model_name(gateways[gateway], tls) == "reached"


async def test_streams_say_the_same(files: Files, gateways: dict[str, str]) -> None:
    with (
        Client(gateways["gateway"]) as client,
        pytest.raises(ConnectionSettingsError, match="speaks TLS"),
    ):
        next(client.chat_stream(HELLO))
    async with AsyncClient(gateways["plaintext"], tls=files.tls()) as asyncio_client:
        with pytest.raises(ConnectionSettingsError, match="speaks plaintext"):
            await anext(asyncio_client.complete_stream("Once"))


def test_a_port_that_closes_connections_is_not_blamed_for_its_protocol(
    files: Files, model_name: GetModel
) -> None:
    """A balancer with nothing behind it does so."""
    with answering(b"") as target:
        for tls in (None, files.tls()):
            with pytest.raises(UnreachableError, match=r"^nothing answers at ") as caught:
                model_name(target, tls)
            assert not isinstance(caught.value, ConnectionSettingsError)


def test_a_server_of_another_protocol_is_recognised(files: Files, model_name: GetModel) -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as target:
        for tls in (None, files.tls()):
            with pytest.raises(ConnectionSettingsError, match="speaks neither gRPC nor TLS"):
                model_name(target, tls)


def test_the_command_says_it_in_one_line_and_gives_no_other_advice(
    run: Run, files: Files, gateways: dict[str, str]
) -> None:
    for command in (("complete", "Once"), ("chat", "--serve", "--ask", "Hello"), ("status",)):
        done = run(*command, "--target", gateways["plaintext"], "--ca", str(files["our-ca.pem"]))
        assert done.returncode == 1
        assert done.stderr == (
            f"Error: {gateways['plaintext']} speaks plaintext, and this client TLS: "
            "leave out tls=, or --tls and --ca\n"
        )


def test_metas_methods_reach_a_locked_gateway(
    files: Files, gateways: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: Any = {"target": gateways["mutual"], "tls": files.tls(cert="friend")}
    with Llama.connect(**locked, api_key="secret") as llama:
        assert llama.text_completion(["Once"]) == [{"generation": "Once!"}]
    with Llama.connect(**locked) as llama, pytest.raises(ChasquiError, match="no key"):
        llama.text_completion(["Once"])
    monkeypatch.setenv("CHASQUI_API_KEY", "secret")
    with Llama.connect(**locked) as llama:
        assert llama.text_completion(["Once"]) == [{"generation": "Once!"}]


def test_files_that_are_no_certificates_are_named(run: Run, files: Files) -> None:
    with pytest.raises(ValueError, match=r"gateway\.key cannot be used as a certificate"):
        Client(tls=Tls(ca=files["gateway.key"]))
    with pytest.raises(ValueError, match=r"friend\.pem cannot .* key values mismatch"):
        Client(tls=Tls(cert=files["friend.pem"], key=files["stranger.key"]))
    with pytest.raises(ValueError, match=r"gateway\.key cannot be used as a certificate"):
        Client(tls=Tls(ca=str(files["gateway.key"])))
    with pytest.raises(ValueError, match="cert and key belong together"):
        Client(tls=Tls(cert=files["friend.pem"]))
    done = run("status", "--ca", str(files["gateway.key"]))
    assert done.returncode == 2
    assert "gateway.key cannot be used as a certificate" in done.stderr
