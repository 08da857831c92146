"""Two thousand streams over HTTP at once: each is served, or refused by a bound that it exceeds."""

import asyncio
import hashlib
import json
import resource
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from llama.v1.chat_pb2 import TextCompleteRequest
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from tests.gateway.conftest import RunningGateway, ScriptedModel, StartGateway, StartServer
from tests.gateway.messages import ids_of

STREAMS = 2000
CONNECTIONS = 1900  # the port's bound; further ones are closed
ANSWERS = 500  # the bound of the crowd's key; further ones are refused with 429
FILES = 2 * STREAMS + 500  # both ends of each connection, and what else is open
BODY = json.dumps({"prompt": [1, 300], "stream": True}).encode()
REQUEST = (
    "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: "
    f"application/json\r\nAuthorization: Bearer crowd\r\nContent-Length: {len(BODY)}\r\n\r\n"
).encode() + BODY


@pytest.fixture
def files() -> Iterator[None]:
    """Enough open files for the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        pytest.skip(f"needs {FILES} open files, and the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def gateway(
    files: None,
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
    tmp_path: Path,
) -> RunningGateway:
    """A gateway that runs as many answers as it admits, some of them for a friend."""
    keys = ""
    for name, bound in (("crowd", f"max_sequences = {ANSWERS}"), ("friend", "")):
        digest = hashlib.sha256(name.encode()).hexdigest()
        keys += f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\n{bound}\n'
    (tmp_path / "keys.toml").write_text(keys)
    model.info.max_batch_size = STREAMS
    address, _ = await start_server(model.service())
    bounds = {"max_connections": CONNECTIONS, "max_queued_sequences": STREAMS}
    # On a slow machine the replica, in the same event loop, answers late while all clients come.
    others = {"api_keys": tmp_path / "keys.toml", "replica_hang_timeout": 600}
    started = await start_gateway(tokenizer_target, address, **bounds, **others)
    await started.until(serving=True)
    return started


async def asked(
    gateway: RunningGateway, open_ones: AsyncExitStack
) -> tuple[str, bytes, asyncio.StreamReader]:
    """How the port begins to answer on a connection of its own, which stays open."""
    host, port = gateway.http_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    open_ones.callback(writer.close)
    writer.write(REQUEST)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return "closed", b"", reader
    return head.split()[1].decode(), head, reader


async def test_each_of_2000_streams_is_served_or_refused_and_grpc_is_undisturbed(
    gateway: RunningGateway, model: ScriptedModel
) -> None:
    async with AsyncExitStack() as open_ones:
        begun = await asyncio.gather(*(asked(gateway, open_ones) for _ in range(STREAMS)))
        outcomes = defaultdict(list)
        for status, head, reader in begun:
            outcomes[status].append((head, reader))
        assert {status: len(found) for status, found in outcomes.items()} == {
            "200": ANSWERS,
            "429": CONNECTIONS - ANSWERS,
            "closed": STREAMS - CONNECTIONS,
        }
        assert all(b"\r\nretry-after: " in head for head, _ in outcomes["429"])
        crowd = [(await model.starts.get()).sequence_id for _ in range(ANSWERS)]
        assert model.starts.empty()

        request = TextCompleteRequest(prompt_ids=[ids_of(1, 300)])
        bearer = (("authorization", "Bearer friend"),)
        friend = asyncio.ensure_future(gateway.stub.TextComplete(request, metadata=bearer))
        sequence = (await model.starts.get()).sequence_id
        model.tell(sequence, ids=[300], finish_reason=FINISH_REASON_STOP)
        assert (await friend).predictions[0].usage.completion_tokens == 1

        for each in crowd:
            model.tell(each, ids=[300])
            model.tell(each, ids=[301], finish_reason=FINISH_REASON_STOP)
        for _, reader in outcomes["200"]:
            events = [line for line in (await reader.read()).splitlines() if line[:5] == b"data:"]
            assert len(events) == 4
            assert events[-1] == b"data: [DONE]"
        assert model.cancels.empty()
