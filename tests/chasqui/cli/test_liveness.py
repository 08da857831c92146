"""When a service counts as hung."""

from collections.abc import Iterable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chasqui.cli.serve.liveness import until_hung

Answer = health_pb2.HealthCheckResponse
UP, DOWN, NONE = Answer.SERVING, Answer.NOT_SERVING, -1


class Scripted(health_pb2_grpc.HealthServicer):
    """Answers one check after the other as it is told; NONE is an error."""

    def __init__(self, answers: Iterable[int]) -> None:
        self.answers = list(answers)

    async def Check(self, request: Any, context: Any) -> Any:
        answer = self.answers.pop(0)
        if answer == NONE:
            await context.abort(grpc.StatusCode.UNAVAILABLE)
        return Answer(status=answer)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([UP, NONE, NONE, UP, NONE, NONE, NONE], "it left 3 health checks in a row unanswered"),
        ([DOWN, DOWN, NONE, NONE, DOWN, NONE, NONE, NONE], "it left 3 health checks in a row"),
        ([DOWN, DOWN, DOWN, UP, *[DOWN] * 4], "its health was not SERVING for 0.08 seconds"),
    ],
)
async def test_silence_and_a_drain_without_end_are_told(
    monkeypatch: pytest.MonkeyPatch, answers: list[int], reason: str
) -> None:
    monkeypatch.setattr("chasqui.cli.serve.liveness.PERIOD", 0.02)
    servicer, server = Scripted(answers), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    told = await until_hung(f"127.0.0.1:{port}", most_not_serving=0.07)
    await server.stop(None)
    assert told.startswith(reason)
    assert not servicer.answers
