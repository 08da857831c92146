"""The cost of refused requests for the services that refuse them, and for others' streams."""

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama.v1.chat_pb2 import TextCompleteStreamRequest
from llama.v1.sampling_pb2 import SamplingParams
from tests.e2e.deployments import Stack
from tests.e2e.memory import MIB
from tests.e2e.processes import ServiceProcess
from tests.e2e.refusals import COUNT

pytestmark = pytest.mark.alone

MANIFESTS = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base"
ATTEMPTS = 3  # one hiccup of the machine is no fault of the gateway
TOLERATED_GAP = 0.1  # seconds


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


async def longest_gap(chat: Any) -> float:
    """Between two events of one stream, in seconds."""
    sampling = SamplingParams(max_gen_len=200, ignore_eos=True)
    request = TextCompleteStreamRequest(prompts=["The"], sampling=sampling)
    times = [time.monotonic() async for _ in chat.TextCompleteStream(request)]
    assert len(times) > 10
    return max(later - earlier for earlier, later in itertools.pairwise(times))


async def gaps_while_refused(stack: Stack, chat: Any) -> tuple[Counter[str], list[float]]:
    """How the refused requests end, and the longest gap of each stream meanwhile."""
    command = ("-m", "tests.e2e.refusals", stack.gateway.address, stack.tokenizer.address)
    sender = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE
    )
    sending = asyncio.create_task(sender.communicate())
    gaps = []
    while not sending.done():
        gaps.append(await longest_gap(chat))
    return Counter(json.loads((await sending)[0])), gaps


async def is_longest_undisturbed(gap: float, chat: Any, streams: int) -> bool:
    """Whether one of so many undisturbed streams has as long a gap, less what is tolerated."""
    for _ in range(streams):
        if gap < await longest_gap(chat) + TOLERATED_GAP:
            return True
    return False


async def test_refused_requests_cost_neither_memory_nor_the_streams_of_others(
    stack: Stack, chat: Any
) -> None:
    limits = {stack.gateway: memory_limit("gateway"), stack.tokenizer: memory_limit("tokenizer")}
    await longest_gap(chat)
    for _ in range(ATTEMPTS):
        watched = {process: Watched(process) for process in limits}
        ends, gaps = await gaps_while_refused(stack, chat)
        # A request may also name a model that is not served.
        assert ends.keys() == {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
        assert ends.total() == COUNT
        for process, memory in watched.items():
            assert memory.peak < limits[process]
            assert memory.growth < 50 * MIB
        if await is_longest_undisturbed(max(gaps), chat, len(gaps)):
            return
    pytest.fail(f"a stream waited for {max(gaps):.3f} s, and none as long undisturbed")
