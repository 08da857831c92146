"""Meta's Python API on Chasqui's engine: in this process (`Llama.build`) or over gRPC (`.connect`).

`llama.v1`, the generated contract, lives in here too: importing this package must stay cheap. So
`Llama` is imported when it is first asked for, and torch by the functions that use it.
"""

from typing import TYPE_CHECKING

from llama.types import ChatPrediction, CompletionPrediction, Dialog, Message, Role

if TYPE_CHECKING:
    from llama.generation import Llama

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Role"]


def __getattr__(name: str) -> object:
    if name == "Llama":
        from llama.generation import Llama

        return Llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
