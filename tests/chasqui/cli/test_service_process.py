"""One service as a child process, and how it ends."""

import asyncio
from asyncio.subprocess import PIPE

from chasqui.cli.serve.service_process import ServiceProcess


async def test_service_that_does_not_end_when_asked_is_killed_and_named() -> None:
    ended: list[ServiceProcess] = []
    log = asyncio.Queue[str]()
    hanging = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", "trap '' TERM; echo ready; read _"), stdin=PIPE, stdout=PIPE
    )
    service = ServiceProcess(
        "model-1", hanging, lambda _name, line: log.put_nowait(line), ended.append
    )
    assert await log.get() == "ready"

    await service.stop(seconds=0.1)

    assert ended == [service]
    assert service.killed_at_end
    assert service.obituary() == "model-1 was killed, because it did not end within 0.1 seconds"


async def test_service_that_ends_when_asked_is_not_said_to_be_killed() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE)
    service = ServiceProcess("model-1", process, lambda *_: None, lambda _: None)

    await service.stop(seconds=60)
    service.kill_at_end("all services were ended at once")

    assert not service.killed_at_end
