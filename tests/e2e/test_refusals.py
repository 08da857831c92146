"""The cost of refused requests for the services that refuse them, and for others' streams."""

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.message import DecodeError, Message

from llama.v1.chat_pb2 import (
    ChatCompleteRequest,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.sampling_pb2 import SamplingParams
from tests.e2e.deployments import Stack
from tests.e2e.memory import MIB
from tests.e2e.processes import ServiceProcess
from tests.e2e.refusals import AT_ONCE, COUNT, shapes

pytestmark = pytest.mark.alone

MANIFESTS = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base"


def memory_limit(component: str) -> int:
    """The memory limit of a component's pods, in bytes."""
    manifests = yaml.safe_load_all((MANIFESTS / f"{component}.yaml").read_text())
    [deployment] = [each for each in manifests if each["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    limit: str = container["resources"]["limits"]["memory"]
    return int(limit[:-2]) * {"Mi": 1, "Gi": 1024}[limit[-2:]] * MIB


class Watched:
    """The memory of a process from now on."""

    def __init__(self, process: ServiceProcess) -> None:
        self._process = process
        self._before = process.resident_bytes
        # proc(5): 5 resets the peak.
        Path(f"/proc/{process.inspect().pid}/clear_refs").write_text("5")

    @property
    def growth(self) -> int:
        return self._process.resident_bytes - self._before

    @property
    def peak(self) -> int:
        status = Path(f"/proc/{self._process.inspect().pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024


class LoopTime:
    """The processor time of the thread in which a process's event loop runs."""

    def __init__(self, process: ServiceProcess) -> None:
        pid = process.inspect().pid
        # The kernel's Documentation/scheduler/sched-stats.rst: nanoseconds on a processor.
        self._path = Path(f"/proc/{pid}/task/{pid}/schedstat")

    @property
    def seconds(self) -> float:
        return int(self._path.read_text().split()[0]) / 1e9


async def longest_work(chat: Any, loop: LoopTime) -> float:
    """The most processor time that the loop takes between two events of one stream.

    Not the time that passes, which depends on what else the machine does.
    """
    sampling = SamplingParams(max_gen_len=200, ignore_eos=True)
    request = TextCompleteStreamRequest(prompts=["The"], sampling=sampling)
    times = [loop.seconds async for _ in chat.TextCompleteStream(request)]
    assert len(times) > 10
    return max(later - earlier for earlier, later in itertools.pairwise(times))


async def work_while_refused(stack: Stack, chat: Any) -> tuple[Counter[str], list[float]]:
    """How the refused requests end, and the longest work beside each stream meanwhile."""
    command = ("-m", "tests.e2e.refusals", stack.gateway.address, stack.tokenizer.address)
    sender = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE
    )
    sending = asyncio.create_task(sender.communicate())
    loop, works = LoopTime(stack.gateway), []
    while not sending.done():
        works.append(await longest_work(chat, loop))
    return Counter(json.loads((await sending)[0])), works


def parse_seconds() -> float:
    """The processor time of parsing the costliest of the requests."""
    kinds: dict[str, type[Message]] = {
        "TextComplete": TextCompleteRequest,
        "ChatComplete": ChatCompleteRequest,
    }
    seconds = []
    for method, request in shapes():
        if kind := kinds.get(method.rpartition("/")[2]):
            began = time.thread_time()
            with contextlib.suppress(DecodeError):
                kind.FromString(request)
            seconds.append(time.thread_time() - began)
    return max(seconds)


async def test_refused_requests_cost_neither_memory_nor_the_streams_of_others(
    stack: Stack, chat: Any
) -> None:
    limits = {stack.gateway: memory_limit("gateway"), stack.tokenizer: memory_limit("tokenizer")}
    await longest_work(chat, LoopTime(stack.gateway))
    watched = {process: Watched(process) for process in limits}
    ends, works = await work_while_refused(stack, chat)
    # A request may also name a model that is not served.
    assert ends.keys() == {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
    assert ends.total() == COUNT
    for process, memory in watched.items():
        assert memory.peak < limits[process]
        assert memory.growth < 50 * MIB
    # As if the loop did nothing else before it had parsed all that come at once.
    assert max(works) < AT_ONCE * parse_seconds()
