"""Chasqui's Python client: `from chasqui import Client`.

It exports the names of the package `client`, which depends only on gRPC; `chasqui.cli` is the
`chasqui` command, and `chasqui.loadtest` its load generator.
"""

# ruff: noqa: F405  # a test compares the list below with `client.__all__`
from typing import TYPE_CHECKING

from client import *  # noqa: F403

__version__: str

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
    "__version__",
    "special_tags",
    "without_special_tags",
]

if not TYPE_CHECKING:  # or a type checker would accept every misspelled name

    def __getattr__(name: str) -> str:
        """`__version__`, read on demand, because `importlib.metadata` is slow to import."""
        if name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415

            return version("chasqui-llama")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
