"""The status of a gateway and of its upstreams, as frozen dataclasses.

Names are the contract's; `protos/llama/v1/operator.proto` and `model.proto` document each field.
States that this client does not know become UpstreamState.UNSPECIFIED.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from client.results import Determinism, determinism
from llama.v1 import model_pb2, operator_pb2


class UpstreamState(Enum):
    """The state of a service behind the gateway."""

    UNSPECIFIED = operator_pb2.UPSTREAM_STATE_UNSPECIFIED
    CONNECTING = operator_pb2.UPSTREAM_STATE_CONNECTING
    SERVING = operator_pb2.UPSTREAM_STATE_SERVING
    NOT_SERVING = operator_pb2.UPSTREAM_STATE_NOT_SERVING
    REFUSED = operator_pb2.UPSTREAM_STATE_REFUSED


_STATES: Mapping[int, UpstreamState] = {state.value: state for state in UpstreamState}


@dataclass(frozen=True, slots=True)
class Upstream:
    """A service behind the gateway; `reason` says why it does not serve."""

    target: str
    state: UpstreamState
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """The model that a replica loaded."""

    name: str
    parameters: int
    context_length: int
    shards: int
    dtype: str
    quantization: str
    device: str
    fingerprint: str
    determinism: Determinism
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class Load:
    """A replica's load report; counters count from its start."""

    running_sequences: int
    waiting_sequences: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    block_size: int
    outstanding_tokens: int
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica; `running_sequences` and `outstanding_tokens` are those of this gateway alone."""

    upstream: Upstream
    info: ReplicaInfo | None
    load: Load | None
    load_age: timedelta | None
    running_sequences: int
    outstanding_tokens: int


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """The status of one gateway and of the services behind it."""

    tokenizer: Upstream
    replicas: tuple[ReplicaStatus, ...]
    running_sequences: int
    queued_sequences: int
    detached_streams: int
    displaced_sequences: int
    uptime: timedelta
    safety: Upstream | None  # None if none is configured
    serving: bool  # the gateway's health


def gateway_status(response: operator_pb2.GetStatusResponse) -> GatewayStatus:
    return GatewayStatus(
        tokenizer=_upstream(response.tokenizer),
        replicas=tuple(_replica(each) for each in response.replicas),
        running_sequences=response.running_sequences,
        queued_sequences=response.queued_sequences,
        detached_streams=response.detached_streams,
        displaced_sequences=response.displaced_sequences,
        uptime=response.uptime.ToTimedelta(),
        safety=_upstream(response.safety) if response.HasField("safety") else None,
        serving=response.serving,
    )


def _upstream(upstream: operator_pb2.Upstream) -> Upstream:
    return Upstream(
        upstream.target, _STATES.get(upstream.state, UpstreamState.UNSPECIFIED), upstream.reason
    )


def _replica(status: operator_pb2.ReplicaStatus) -> ReplicaStatus:
    return ReplicaStatus(
        upstream=_upstream(status.upstream),
        info=_info(status.info) if status.HasField("info") else None,
        load=_load(status.load) if status.HasField("load") else None,
        load_age=status.load_age.ToTimedelta() if status.HasField("load_age") else None,
        running_sequences=status.running_sequences,
        outstanding_tokens=status.outstanding_tokens,
    )


def _info(info: model_pb2.GetModelInfoResponse) -> ReplicaInfo:
    fields = {name: getattr(info, name) for name in ReplicaInfo.__dataclass_fields__}
    return ReplicaInfo(**fields | {"determinism": determinism(info.determinism)})


def _load(load: model_pb2.GetLoadResponse) -> Load:
    return Load(**{name: getattr(load, name) for name in Load.__dataclass_fields__})
