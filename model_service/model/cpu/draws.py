"""Draws from logits by the compiled library, by the rules of engine/sampling/host/truncation.py.

The probabilities come from a softmax of the library's own, so their last bits differ from those of
PyTorch's. Everything behind them is computed in the same order, to the last bit.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.model.cpu.layers import Scan
from model_service.model.cpu.library import declare, find_library

_INT, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_float, ctypes.c_void_p


class Draw(NamedTuple):
    """The draw of one token."""

    row: int  # of the logits
    top_k: int  # the vocabulary's size where it is off
    temperature: float  # above 0
    min_p: float
    top_p: float
    seed: int
    position: int  # of the token in its sequence


class _Draw(ctypes.Structure):
    """As in source/draws.cpp."""

    _fields_ = (
        ("row", _INT),
        ("top_k", _INT),
        ("temperature", _FLOAT),
        ("min_p", _FLOAT),
        ("top_p", _FLOAT),
        ("seed", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
    )


def draw(
    scan: Scan, draws: Sequence[Draw], probabilities: NDArray[np.float32] | None = None
) -> list[int]:
    """One token for each draw.

    Args:
        scan: of logits that the library has computed; their rows are finite.
        draws: parameters, in any order of rows.
        probabilities: [draws, vocab], receives what the tokens are drawn from.
    """
    structures = (_Draw * len(draws))(*(_Draw(*each) for each in draws))
    tokens = (_INT * len(draws))()
    _library().chasqui_draw(
        scan.address,
        scan.vocab,
        structures,
        len(draws),
        tokens,
        None if probabilities is None else probabilities.ctypes.data,
        torch.get_num_threads(),
    )
    return list(tokens)


@functools.cache
def _library() -> ctypes.CDLL:
    library = find_library()
    if isinstance(library, str):
        raise TypeError(library)  # without it nothing makes a Scan
    declare(
        library,
        {"chasqui_draw": (_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT)},
    )
    return library
