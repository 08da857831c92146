"""The sampling parameters of a step's rows as named columns, one value per row.

Both samplers compute with them: the host with numpy's arrays, the device with tensors of the same
shapes and types.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from model_service.engine.sampling.philox import uniforms
from model_service.engine.sequence import SamplingParams

# Below it a logit divided by the temperature may overflow; at it only equal logits share the mass.
MIN_TEMPERATURE = 1e-30
ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True, slots=True)
class DrawColumns(Generic[ArrayT]):
    """Parameters of a draw; each [rows, 1]."""

    top_k: ArrayT  # int64; the vocabulary's size where it is off
    min_p: ArrayT  # float32
    top_p: ArrayT  # float32
    uniform: ArrayT  # float64 in [0, 1 − 2⁻³²], so that uniform × total stays below the total

    def rows(self, rows: slice | NDArray[np.intp]) -> "DrawColumns[ArrayT]":
        """The columns of some rows: a slice or indices."""
        return DrawColumns(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class PenaltyColumns(Generic[ArrayT]):
    """Penalties on logits; each [rows, 1] float32."""

    repetition: ArrayT
    frequency: ArrayT
    presence: ArrayT


def draw_columns(
    params: Sequence[SamplingParams], positions: Sequence[int], vocab: int
) -> DrawColumns[NDArray[Any]]:
    """The columns of rows that draw.

    Args:
        params: [rows].
        positions: [rows], index of the drawn token in its sequence, prompt included.
        vocab: size of the vocabulary.
    """
    seeds = np.array([each.seed for each in params], dtype=np.uint64)
    return DrawColumns(
        top_k=_column([min(each.top_k or vocab, vocab) for each in params], np.int64),
        min_p=_column([each.min_p for each in params], np.float32),
        top_p=_column([each.top_p for each in params], np.float32),
        uniform=uniforms(seeds, np.array(positions))[:, np.newaxis],
    )


def temperature_column(params: Sequence[SamplingParams]) -> NDArray[Any]:
    """The divisors of logits [rows, 1] float32."""
    return _column([max(each.temperature, MIN_TEMPERATURE) for each in params], np.float32)


def penalty_columns(params: Sequence[SamplingParams]) -> PenaltyColumns[NDArray[Any]]:
    return PenaltyColumns(
        repetition=_column([each.repetition_penalty for each in params], np.float32),
        frequency=_column([each.frequency_penalty for each in params], np.float32),
        presence=_column([each.presence_penalty for each in params], np.float32),
    )


def _column(values: list[Any], dtype: type[np.generic]) -> NDArray[Any]:
    return np.array(values, dtype=dtype)[:, np.newaxis]
