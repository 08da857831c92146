"""OperatorService: read-only status of the gateway. Holds no state."""

import asyncio
import time
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from gateway.admission.admission import Admission
from gateway.replicas.replica import ReplicaClient
from gateway.rpc.named_streams import NamedStreams
from gateway.rpc.upstreams import Backend
from gateway.upstream.session import Upstream
from llama.v1 import operator_pb2, operator_pb2_grpc

OPERATOR_SERVICE_NAME = operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class OperatorServicer(operator_pb2_grpc.OperatorServiceServicer):
    def __init__(self, backend: Backend, admission: Admission, streams: NamedStreams) -> None:
        self._backend = backend
        self._admission = admission
        self._streams = streams
        self._started = time.monotonic()

    async def GetStatus(
        self,
        _request: operator_pb2.GetStatusRequest,
        _context: Context,
    ) -> operator_pb2.GetStatusResponse:
        replicas, classifier = self._backend.replicas.replicas, self._backend.classifier
        connected = (replica for replica in replicas if replica.info is not None)
        await asyncio.gather(*(replica.load.refresh() for replica in connected))
        return operator_pb2.GetStatusResponse(
            tokenizer=_upstream(self._backend.tokenizer.upstream),
            replicas=map(_replica_status, replicas),
            running_sequences=self._admission.running_sequences,
            queued_sequences=self._admission.queued_sequences,
            detached_streams=self._streams.detached,
            displaced_sequences=sum(self._admission.displaced_sequences.values()),
            uptime=_duration(time.monotonic() - self._started),
            safety=None if classifier is None else _upstream(classifier.upstream),
            serving=self._backend.ready,
        )


def _upstream(upstream: Upstream) -> operator_pb2.Upstream:
    return operator_pb2.Upstream(
        target=upstream.target, state=upstream.state, reason=upstream.reason
    )


def _replica_status(replica: ReplicaClient) -> operator_pb2.ReplicaStatus:
    age = replica.load.age
    return operator_pb2.ReplicaStatus(
        upstream=_upstream(replica.upstream),
        info=replica.info,
        load=replica.load.latest,
        load_age=None if age is None else _duration(age),
        running_sequences=replica.sequences,
        outstanding_tokens=replica.outstanding_tokens,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
