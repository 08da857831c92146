"""Chasqui's Python client: `from chasqui import Client`.

The names are those of the package `client`, which needs nothing but gRPC; `chasqui.cli` is the
`chasqui` command and `chasqui.loadtest` its load generator.
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
    "Started",
    "StreamLostError",
    "TextOptions",
    "Tls",
    "Token",
    "TokenLogprob",
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

if not TYPE_CHECKING:  # it would give every misspelled name a type

    def __getattr__(name: str) -> str:
        """`__version__`, read on demand: `importlib.metadata` adds a third to the import's time."""
        if name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415

            return version("chasqui-llama")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
