"""Meta's Python API on Chasqui's engine: in this process (`Llama.build`) or over gRPC (`.connect`).

`llama.v1`, the generated contract, lives in here too: importing this package must stay cheap, so
what needs torch is imported by the functions that use it.
"""

from llama.generation import Llama
from llama.types import ChatPrediction, CompletionPrediction, Dialog, Message, Role

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Role"]
