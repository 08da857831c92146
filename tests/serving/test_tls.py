"""Certificates of real servers: who is let in, and what happens when the files change."""

import asyncio
import datetime
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.wrappers_pb2 import StringValue

from serving.errors import StartError
from serving.healthcheck import health
from serving.security.tls import ServerCertificates, TlsFiles, UpstreamCertificates
from serving.server import channel, running
from serving.settings import ServerSettings

Logged = Callable[[], list[dict[str, Any]]]


def issue(authority: trustme.CA, folder: Path, **attributes: Any) -> TlsFiles:
    """A certificate's files, in place of those that were there."""
    issued = authority.issue_cert("127.0.0.1", **attributes)
    files = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
    files[0].write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    files[1].write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(files[2])
    return TlsFiles(*files)


def settings(files: TlsFiles, **more: Any) -> ServerSettings:
    return ServerSettings(tls_cert=files.cert, tls_key=files.key, **more)


async def say(target: str, files: TlsFiles | UpstreamCertificates) -> str:
    """The answer to a caller with these files, or the reason that there is none."""
    certificates = UpstreamCertificates(files) if isinstance(files, TlsFiles) else files
    async with channel(target, certificates) as to_server:
        method: Any = to_server.unary_unary(
            "/test.Echo/unary_unary", StringValue.SerializeToString, StringValue.FromString
        )
        try:
            return str((await method(StringValue(value="hello"), timeout=30)).value)
        except grpc.aio.AioRpcError as error:
            return str(error.details())


async def test_caller_trusts_its_authority_alone(
    tmp_path: Path, echo: Any, servers: AsyncExitStack
) -> None:
    (tmp_path / "other").mkdir()
    files = issue(trustme.CA(), tmp_path)
    server = await servers.enter_async_context(running(settings(files), echo.service()))
    assert await say(server.address, TlsFiles(None, None, files.ca)) == "hello"
    other = issue(trustme.CA(), tmp_path / "other")
    assert "CERTIFICATE_VERIFY_FAILED" in await say(server.address, other)


async def test_new_certificate_is_shown_without_a_restart(
    tmp_path: Path, echo: Any, servers: AsyncExitStack, logged: Logged
) -> None:
    files = issue(trustme.CA(), tmp_path)
    server = await servers.enter_async_context(running(settings(files), echo.service()))
    assert await say(server.address, files) == "hello"
    files = issue(trustme.CA(), tmp_path)
    assert await say(server.address, files) == "hello"
    assert "certificates reloaded" in [line["event"] for line in logged()]


async def test_certificate_is_shown_that_was_written_in_place_under_the_old_time(
    tmp_path: Path, echo: Any, servers: AsyncExitStack
) -> None:
    def padded(files: TlsFiles) -> TlsFiles:
        for path in files:
            assert path is not None
            path.write_bytes(path.read_bytes().ljust(4096, b"\n"))
            os.utime(path, (0, 0))
        return files

    files = padded(issue(trustme.CA(), tmp_path))
    server = await servers.enter_async_context(running(settings(files), echo.service()))
    files = padded(issue(trustme.CA(), tmp_path))
    assert await say(server.address, files) == "hello"


async def test_caller_reads_its_files_again_when_it_connects(
    tmp_path: Path, echo: Any, servers: AsyncExitStack
) -> None:
    files = issue(trustme.CA(), tmp_path)
    locked = settings(files, tls_client_ca=files.ca)
    server = await servers.enter_async_context(running(locked, echo.service()))
    caller = UpstreamCertificates(files)
    assert await say(server.address, caller) == "hello"
    issue(trustme.CA(), tmp_path)
    assert await say(server.address, caller) == "hello"


async def test_broken_new_certificate_is_told_of_once_and_not_used(
    tmp_path: Path, echo: Any, servers: AsyncExitStack, logged: Logged
) -> None:
    files = issue(trustme.CA(), tmp_path)
    server = await servers.enter_async_context(running(settings(files), echo.service()))
    (tmp_path / "cert.pem").write_bytes(trustme.CA().issue_cert("a").cert_chain_pems[0].bytes())
    trusting = TlsFiles(None, None, files.ca)
    assert [await say(server.address, trusting) for _ in range(3)] == ["hello"] * 3
    [line] = [each for each in logged() if "not reloaded" in each["event"]]
    assert line["reason"].endswith("not usable as certificate or key: key values mismatch")


@pytest.mark.parametrize("age", [None, datetime.timedelta(days=1)])
async def test_callers_without_a_valid_certificate_are_refused(
    tmp_path: Path, echo: Any, servers: AsyncExitStack, age: datetime.timedelta | None
) -> None:
    authority = trustme.CA()
    files = issue(authority, tmp_path)
    server = await servers.enter_async_context(
        running(settings(files, tls_client_ca=files.ca), echo.service())
    )
    assert await say(server.address, files) == "hello"
    unknown = TlsFiles(None, None, files.ca)
    if age is not None:
        now = datetime.datetime.now(datetime.UTC)
        unknown = issue(authority, tmp_path, not_before=now - 2 * age, not_after=now - age)
    assert await say(server.address, unknown) != "hello"


async def test_health_port_needs_no_certificate(
    tmp_path: Path, echo: Any, servers: AsyncExitStack, logged: Logged
) -> None:
    files = issue(trustme.CA(), tmp_path)
    locked = settings(files, tls_client_ca=files.ca, health_port=0)
    await servers.enter_async_context(running(locked, echo.service()))
    [address] = [line["health_address"] for line in logged() if "health_address" in line]
    assert await asyncio.to_thread(health, address, 30) == "SERVING"
    async with channel(address) as to_server:
        method: Any = to_server.unary_unary("/test.Echo/unary_unary")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(b"")
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_unusable_files_are_named(tmp_path: Path) -> None:
    files = issue(trustme.CA(), tmp_path)
    with pytest.raises(StartError, match=r"absent\.pem.*cannot be read: No such file"):
        ServerCertificates(TlsFiles(tmp_path / "absent.pem", files.key, None))
    with pytest.raises(StartError, match=r"key\.pem: not usable as certificate or key"):
        UpstreamCertificates(TlsFiles(None, None, files.key))
