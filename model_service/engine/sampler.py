"""Chooses tokens from logits: one vectorised pass over a step's rows, each with its own settings.

The draw is an inverse CDF over the kept tokens in the order of their ids, not of their
probabilities: then a rounding difference in the logits can only move a border by as much, and never
swap two tokens of nearly equal probability.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from model_service.engine.sequence import SamplingParams, Sequence, TokenLogprobs
from model_service.engine.uniform import uniforms

# Below it a logit divided by the temperature may overflow; at it only equal logits share the mass.
LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True)
class _Settings:
    """One column per sampling parameter, one row per sequence: [rows, 1] on the logits' device."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    uniform: torch.Tensor


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence.

    Args:
        logits: [rows, vocab] float32, finite; a sequence's row predicts the token at its end.
        sequences: one per row.
    """
    logits = adjust(logits, sequences)
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.request.sampling.greedy]
    if drawn:
        settings = _settings([sequences[row] for row in drawn], logits)
        probabilities = torch.softmax(logits[drawn] / settings.temperature, dim=-1)
        kept = keep_most_probable(probabilities, settings.top_k, settings.top_p)
        tokens[drawn] = draw(kept, settings.uniform)
    return tokens.tolist()


def adjust(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Logits with penalties and biases applied; the same tensor when no sequence has any."""
    rows = [row for row, s in enumerate(sequences) if s.request.sampling.adjusts_logits]
    if not rows:
        return logits
    params = [sequences[row].request.sampling for row in rows]
    adjusted = logits[rows]
    counts = _counts([sequences[row].tokens for row in rows], adjusted)
    answers = [_answer(sequences[row]) for row in rows]
    answer_counts = _counts(answers, adjusted)

    repetition = _column([p.repetition_penalty for p in params], adjusted)
    penalized = torch.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
    adjusted = torch.where(counts > 0, penalized, adjusted)
    adjusted -= _column([p.frequency_penalty for p in params], adjusted) * answer_counts
    adjusted -= _column([p.presence_penalty for p in params], adjusted) * (answer_counts > 0)
    _add_biases(adjusted, params)
    result = logits.clone()
    result[rows] = adjusted
    return result


def keep_most_probable(
    probabilities: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Probabilities outside the top-k, top-p set put to zero.

    Top-p is `sample_top_p` of Meta's llama/generation.py: sorted descending, a token is dropped
    when the mass before it is greater than top_p. With top_p ≥ 1 none is, whatever the sum rounds
    to.

    Args:
        probabilities: [rows, vocab].
        top_k: [rows, 1], the vocabulary's size where it is off.
        top_p: [rows, 1].
    """
    ordered, ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    # Top-p measures mass among what top-k left.
    shares = torch.where(
        top_k < ordered.shape[-1], ordered / ordered.sum(dim=-1, keepdim=True), ordered
    )
    mass_before = torch.cumsum(shares, dim=-1) - shares
    ordered = ordered.masked_fill((mass_before > top_p) & (top_p < 1.0), 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, ordered)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: for each row the first id whose cumulated weight exceeds uniform × total.

    Args:
        weights: [rows, vocab], not normalised.
        uniform: [rows, 1] float64 in [0, 1 − 2⁻³²], so that the product stays below the total.
    """
    cumulated = weights.double().cumsum(dim=-1)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(-1)


def score(logits: torch.Tensor, targets: Rows[int], alternatives: Rows[int]) -> list[TokenLogprobs]:
    """Logprobs under the raw distribution.

    Args:
        logits: [rows, vocab] float32 as the network gave them.
        targets: [rows], the token that was chosen (or, in a prompt, stands) there.
        alternatives: [rows], how many of the most probable tokens to name.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, torch.tensor(targets, device=logits.device).unsqueeze(-1))
    most = max(alternatives)
    if not most:
        return [TokenLogprobs(value) for value in chosen.squeeze(-1).tolist()]
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    rows = zip(
        chosen.squeeze(-1).tolist(), ids.tolist(), values.tolist(), alternatives, strict=True
    )
    return [
        TokenLogprobs(own, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for own, row_ids, row_values, count in rows
    ]


def _settings(sequences: Rows[Sequence], logits: torch.Tensor) -> _Settings:
    params = [sequence.request.sampling for sequence in sequences]
    vocab = logits.shape[-1]
    numbers = uniforms(
        np.array([p.seed for p in params], dtype=np.uint64),
        np.array([len(sequence.tokens) for sequence in sequences]),
    )
    return _Settings(
        temperature=_column([max(p.temperature, LEAST_TEMPERATURE) for p in params], logits),
        top_p=_column([p.top_p for p in params], logits),
        top_k=_column([p.top_k or vocab for p in params], logits),
        uniform=torch.from_numpy(numbers).to(logits.device).unsqueeze(-1),
    )


def _column(values: Rows[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _answer(sequence: Sequence) -> list[int]:
    return sequence.tokens[len(sequence.request.prompt_ids) - sequence.request.offset :]


def _counts(token_lists: Rows[list[int]], like: torch.Tensor) -> torch.Tensor:
    """How often each token of the vocabulary stands in each list [rows, vocab]."""
    lengths = torch.tensor([len(tokens) for tokens in token_lists])
    rows = torch.repeat_interleave(torch.arange(len(token_lists)), lengths)
    columns = torch.tensor([token for tokens in token_lists for token in tokens], dtype=torch.long)
    indices = rows.to(like.device), columns.to(like.device)
    ones = torch.ones(len(columns), dtype=like.dtype, device=like.device)
    return torch.zeros_like(like).index_put_(indices, ones, accumulate=True)


def _add_biases(logits: torch.Tensor, params: Rows[SamplingParams]) -> None:
    """Adds each row's logit_bias in place."""
    entries = [
        (row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()
    ]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        indices = torch.tensor([rows, tokens], device=logits.device)
        values = torch.tensor(biases, dtype=logits.dtype, device=logits.device)
        logits.index_put_((indices[0], indices[1]), values, accumulate=True)
