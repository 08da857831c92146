"""Changes of the logits on the host before a draw: penalties, biases, masked stop ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.engine.sampling.columns import penalty_columns
from model_service.engine.sequence import SamplingParams

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """All that the choice of one token depends on, besides its logits."""

    params: SamplingParams
    tokens: Sequence[int]  # all before the one to be chosen
    answer_start: int  # index of the answer's first token
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer; no penalty changes them

    @property
    def changes_logits(self) -> bool:
        """Whether the token is not drawn from the logits as they are."""
        return self.params.has_penalties or self.masks_stops

    @property
    def masks_stops(self) -> bool:
        """Whether the answer is too short to end."""
        return len(self.tokens) - self.answer_start < self.params.min_gen_len


def apply_penalties(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits [rows, vocab] as tokens are drawn from them; the same tensor if no row changes any."""
    if not any(row.changes_logits for row in rows):
        return logits
    changed = logits.clone()
    _penalize_repetition(changed, rows)
    _penalize_answers(changed, rows)
    _restore_stops(changed, logits, rows)
    _add_biases(changed, rows)
    _mask_stops(changed, rows)
    return changed


def _penalize_repetition(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divides positive and multiplies negative logits of prompt and answer tokens, in place."""
    wanted = [(i, row) for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not wanted:
        return
    lengths = [len(row.tokens) for _, row in wanted]
    indices = _flat(wanted, (row.tokens for _, row in wanted), lengths, logits)
    repetition = penalty_columns([row.params for _, row in wanted]).repetition[:, 0]
    penalty = _on_device(np.repeat(repetition, lengths), logits)
    # A token that stands several times is written several times, with the same value.
    positions = _on_device(indices, logits)
    before = logits.view(-1)[positions]
    after = torch.where(before > 0, before / penalty, before * penalty)
    logits.view(-1)[positions] = after.clamp_(-_LARGEST, _LARGEST)


def _penalize_answers(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Subtracts frequency and presence penalties from the logits of answer tokens, in place."""
    wanted = [
        (i, row)
        for i, row in enumerate(rows)
        if row.params.frequency_penalty or row.params.presence_penalty
    ]
    if not wanted:
        return
    answers = [row.tokens[row.answer_start :] for _, row in wanted]
    indices, counts = np.unique(
        _flat(wanted, answers, [len(answer) for answer in answers], logits), return_counts=True
    )
    columns = penalty_columns([row.params for row in rows])
    row_of_index = indices // logits.shape[-1]
    frequency, presence = columns.frequency[row_of_index, 0], columns.presence[row_of_index, 0]
    positions = _on_device(indices, logits)
    penalized = logits.view(-1)[positions]
    penalized -= _on_device(frequency * counts.astype(np.float32), logits)
    penalized -= _on_device(presence, logits)
    logits.view(-1)[positions] = penalized


def _restore_stops(
    adjusted: torch.Tensor, logits: torch.Tensor, rows: Sequence[SamplingRow]
) -> None:
    """Undoes the penalties of each row's stop ids, in place.

    The EOS that ends the earlier turns of a dialog must not make a later answer longer.
    """
    wanted = [(i, row) for i, row in enumerate(rows) if row.stop_ids]
    if not wanted:
        return
    stops = [row.stop_ids for _, row in wanted]
    positions = _on_device(_flat(wanted, stops, [*map(len, stops)], logits), logits)
    adjusted.view(-1)[positions] = logits.reshape(-1)[positions]


def _add_biases(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Adds each row's logit_bias in place."""
    wanted = [(i, row) for i, row in enumerate(rows) if row.params.logit_bias]
    if not wanted:
        return
    biases = [row.params.logit_bias for _, row in wanted]
    indices = _flat(wanted, biases, [len(bias) for bias in biases], logits)
    values = np.fromiter(chain.from_iterable(bias.values() for bias in biases), dtype=np.float32)
    logits.view(-1)[_on_device(indices, logits)] += _on_device(values, logits)


def _mask_stops(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Excludes the stop ids of answers that are too short, in place."""
    wanted = [(i, row) for i, row in enumerate(rows) if row.masks_stops]
    stops = [row.stop_ids for _, row in wanted]
    indices = _flat(wanted, stops, [*map(len, stops)], logits)
    logits.view(-1)[_on_device(indices, logits)] = -torch.inf


def _flat(
    wanted: Sequence[tuple[int, SamplingRow]],
    tokens: Iterable[Iterable[int]],
    lengths: Sequence[int],
    logits: torch.Tensor,
) -> NDArray[np.int64]:
    """Indices of each row's tokens [sum of lengths] into the flattened logits."""
    begins = np.array([i for i, _ in wanted], dtype=np.int64) * logits.shape[-1]
    columns = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=sum(lengths))
    return np.repeat(begins, lengths) + columns


def _on_device(values: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)
