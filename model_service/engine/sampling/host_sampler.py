"""Chooses tokens from logits: one vectorised pass over a step's rows, each with its own settings.

The draw is an inverse CDF over the kept tokens in the order of their ids, not of their
probabilities: then a rounding difference in the logits can only move a border by as much, and never
swap two tokens of nearly equal probability.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.engine.sampling.host_truncation import Truncation, choose, in_highest_blocks
from model_service.engine.sampling.philox import uniforms
from model_service.engine.sequence import SamplingParams, TokenLogprobs

# Below it a logit divided by the temperature may overflow; at it only equal logits share the mass.
MIN_TEMPERATURE = 1e-30
_LARGEST = torch.finfo(torch.float32).max
_ROWS_SCORED_AT_ONCE = 16  # 2 MB of logprobs: a whole prompt's do not fit any processor's cache


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the choice of one token depends on, besides its logits."""

    params: SamplingParams
    tokens: Sequence[int]  # all before the one to be chosen
    answer_start: int  # index of the answer's first token
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer; no penalty changes them


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The next token of each row.

    Args:
        logits: [rows, vocab] float32, finite.
        rows: one per row of logits.
    """
    logits = adjust(logits, rows)
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if not drawn:
        return _argmax(logits)
    if len(drawn) == len(rows):
        return _draw(logits, rows)
    tokens = dict(zip(drawn, _draw(logits[drawn], [rows[index] for index in drawn]), strict=True))
    greedy = [index for index in range(len(rows)) if index not in tokens]
    tokens |= zip(greedy, _argmax(logits[greedy]), strict=True)
    return [tokens[index] for index in range(len(rows))]


def adjust(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits with penalties and biases applied; the same tensor when no row has any."""
    if not any(row.params.has_penalties for row in rows):
        return logits
    adjusted = logits.clone()
    _penalize_repetition(adjusted, rows)
    _penalize_answers(adjusted, rows)
    _restore_stops(adjusted, logits, rows)
    _add_biases(adjusted, rows)
    return adjusted


def score(
    logits: torch.Tensor, targets: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """Logprobs under the raw distribution.

    Args:
        logits: [rows, vocab] float32 as the network gave them.
        targets: [rows], the token that was chosen (or, in a prompt, stands) there.
        alternatives: [rows], how many of the most probable tokens to name.
    """
    scores: list[TokenLogprobs] = []
    for part in torch.split(logits, _ROWS_SCORED_AT_ONCE):
        own = slice(len(scores), len(scores) + len(part))
        scores += _score(part, targets[own], alternatives[own])
    return scores


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """For each row of [rows, vocab] whether all of its logits are finite."""
    # On a CPU a sum is 20 times cheaper than looking at each logit, and no NaN or infinity gets
    # lost in it; where large numbers made it overflow, the second look tells.
    finite = torch.isfinite(logits.sum(dim=-1))
    if not finite.all():
        suspects = ~finite
        finite[suspects] = torch.isfinite(logits[suspects]).all(dim=-1)
    return [bool(value) for value in finite.tolist()]


def _argmax(logits: torch.Tensor) -> list[int]:
    """The lowest id among the largest logits of each row."""
    if logits.device.type == "cpu":  # where numpy's is 8 times faster
        return [int(token) for token in logits.numpy().argmax(axis=-1)]
    return [int(token) for token in logits.argmax(dim=-1).tolist()]


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    vocab = logits.shape[-1]
    columns = np.array(
        [
            (max(p.temperature, MIN_TEMPERATURE), p.min_p, p.top_p, min(p.top_k or vocab, vocab))
            for p in (row.params for row in rows)
        ]
    )
    temperature, min_p, top_p = columns[:, :3].astype(np.float32).T[..., np.newaxis]
    numbers = uniforms(
        np.array([row.params.seed for row in rows], dtype=np.uint64),
        np.array([len(row.tokens) for row in rows]),
    )
    truncation = Truncation(columns[:, 3:].astype(np.int64), min_p, top_p, numbers[:, np.newaxis])
    scaled = logits / _on_device(np.ascontiguousarray(temperature), logits)
    if temperature.min() < 1e-6:
        scaled.clamp_(-_LARGEST, _LARGEST)
    # In place: touching fresh megabytes takes longer than the exponentials.
    probabilities = torch.softmax(scaled, dim=-1, out=scaled)
    return [int(token) for token in choose(probabilities, truncation)]


def _penalize_repetition(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divides positive and multiplies negative logits of prompt and answer tokens, in place."""
    wanted = [(i, row) for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not wanted:
        return
    lengths = [len(row.tokens) for _, row in wanted]
    indices = _flat(wanted, (row.tokens for _, row in wanted), lengths, logits)
    penalties = np.array([row.params.repetition_penalty for _, row in wanted], dtype=np.float32)
    penalty = _on_device(np.repeat(penalties, lengths), logits)
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
    of_row = np.zeros((2, len(rows)), dtype=np.float32)
    for i, row in wanted:
        of_row[:, i] = row.params.frequency_penalty, row.params.presence_penalty
    frequency, presence = of_row[:, indices // logits.shape[-1]]
    positions = _on_device(indices, logits)
    penalized = logits.view(-1)[positions]
    penalized -= _on_device(frequency * counts.astype(np.float32), logits)
    penalized -= _on_device(presence, logits)
    logits.view(-1)[positions] = penalized


def _restore_stops(
    adjusted: torch.Tensor, logits: torch.Tensor, rows: Sequence[SamplingRow]
) -> None:
    """Takes the penalties of each row's stop ids back, in place.

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


def _score(
    logits: torch.Tensor, targets: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    # One fused kernel: logsumexp would read the logits four times and take longer.
    logprobs = torch.log_softmax(logits, dim=-1)
    indices = torch.tensor(targets, device=logits.device).unsqueeze(-1)
    chosen = logprobs.gather(-1, indices).squeeze(-1).tolist()
    most = min(max(alternatives), logits.shape[-1])
    if not most:
        return [TokenLogprobs(value) for value in chosen]
    candidates, ids, _ = in_highest_blocks(logprobs, most)
    values, places = candidates.topk(most, dim=-1)
    rows = zip(chosen, ids.gather(-1, places).tolist(), values.tolist(), alternatives, strict=True)
    return [
        TokenLogprobs(own, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for own, row_ids, row_values, count in rows
    ]
