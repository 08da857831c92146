"""Which replica a prompt goes to; the sessions stand still, only what is known of them counts."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from gateway.replicas.prefix_index import BLOCK, block_digests
from gateway.replicas.replica import ReplicaClient
from gateway.replicas.routing import choose
from gateway.upstream.connect import plaintext
from llama.v1.model_pb2 import GetLoadResponse, GetModelInfoResponse, StartSequence, TokenEvent


@dataclass(frozen=True)
class Running:
    outstanding_tokens: int

    def on_event(self, event: TokenEvent, now: float) -> bool:
        return False


PROMPT = list(range(3 * BLOCK))
MakeReplica = Callable[..., ReplicaClient]


@pytest.fixture
async def replica() -> MakeReplica:
    """A replica that knows the first `known` blocks of PROMPT and runs `running` sequences."""

    def make(known: int = 0, running: int = 0, tokens: int = 10, **load: int) -> ReplicaClient:
        made = ReplicaClient("127.0.0.1:1", lambda _: None, lambda: None, 1.0, plaintext)
        made.info = GetModelInfoResponse(max_batch_size=4, context_length=100)
        load = {"total_blocks": 99, "free_blocks": 99, "block_size": BLOCK, **load}
        made.load.record(GetLoadResponse(**load))
        made.prefixes.add(block_digests(PROMPT)[:known])
        for _ in range(running):
            made.start(StartSequence(), "call", Running(tokens))
        return made

    return make


def chosen(*replicas: ReplicaClient) -> int:
    best = choose(replicas, block_digests(PROMPT), len(PROMPT))
    assert best is not None
    return replicas.index(best)


async def test_the_longest_known_beginning_decides(replica: MakeReplica) -> None:
    assert chosen(replica(known=1), replica(known=3, running=2), replica(known=2)) == 1


async def test_what_is_equally_known_goes_to_the_less_busy(replica: MakeReplica) -> None:
    assert chosen(replica(running=2), replica(running=1), replica(running=3)) == 1
    assert chosen(replica(2, running=2), replica(2, running=1), replica(running=0)) == 1


@pytest.mark.parametrize(
    "full",
    [
        {"running": 4},  # as many as run at once
        {"running": 1, "tokens": 300},  # much busier than the others
        {"running": 2, "waiting_sequences": 1},
        {"running": 2, "free_blocks": 2},
    ],
)
async def test_a_known_beginning_does_not_count_without_room(
    replica: MakeReplica, full: dict[str, int]
) -> None:
    assert chosen(replica(known=3, **full), replica(running=1)) == 1
