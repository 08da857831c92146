"""Clients of Chasqui's gateway: `Client`, `AsyncClient`, and the types they take and return."""

from client.connection import quiet_grpc  # noqa: F401, I001  # before any other import of gRPC
from client.aio import AsyncClient
from client.connection.channel import DEFAULT_TARGET, Tls
from client.errors import (
    ChasquiError,
    ConnectionSettingsError,
    DeadlineExceededError,
    InvalidRequestError,
    ResourceExhaustedError,
    StreamLostError,
    UnavailableError,
    UnreachableError,
    Violation,
)
from client.requests import ChatOptions, Dialog, Message, Prompt, Sampling, TextOptions
from client.results import (
    Delta,
    Determinism,
    Event,
    Finished,
    FinishReason,
    Limits,
    Model,
    Prediction,
    RenderedPrompt,
    Started,
    Token,
    TokenLogprob,
    Usage,
)
from client.scores import DetokenizedText, Score, TextToken, Tokenization
from client.status import GatewayStatus, Load, ReplicaInfo, ReplicaStatus, Upstream, UpstreamState
from client.sync import Client
from llama.prompt_format.tags import special_tags, without_special_tags

__all__ = [
    "DEFAULT_TARGET",
    "AsyncClient",
    "ChasquiError",
    "ChatOptions",
    "Client",
    "ConnectionSettingsError",
    "DeadlineExceededError",
    "Delta",
    "Determinism",
    "DetokenizedText",
    "Dialog",
    "Event",
    "FinishReason",
    "Finished",
    "GatewayStatus",
    "InvalidRequestError",
    "Limits",
    "Load",
    "Message",
    "Model",
    "Prediction",
    "Prompt",
    "RenderedPrompt",
    "ReplicaInfo",
    "ReplicaStatus",
    "ResourceExhaustedError",
    "Sampling",
    "Score",
    "Started",
    "StreamLostError",
    "TextOptions",
    "TextToken",
    "Tls",
    "Token",
    "TokenLogprob",
    "Tokenization",
    "UnavailableError",
    "UnreachableError",
    "Upstream",
    "UpstreamState",
    "Usage",
    "Violation",
    "special_tags",
    "without_special_tags",
]
