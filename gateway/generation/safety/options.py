"""Options of the safety classifier."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SafetyOptions:
    target: str
    on_failure: Literal["closed", "open"]
    timeout: float  # seconds for one judgement
    chunk: int  # characters of an answer that are judged, and then shown, together
