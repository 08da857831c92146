"""Sampling on the host: one vectorised pass over a step's rows, each with its own parameters.

The draw is an inverse CDF over the kept tokens in the order of their ids, not of their
probabilities: then a rounding difference in the logits can only move a border by as much, and never
swap two tokens of nearly equal probability.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model_service.engine.sampling.columns import draw_columns, temperature_column
from model_service.engine.sampling.host.logprobs import score
from model_service.engine.sampling.host.penalties import SamplingRow, apply_penalties
from model_service.engine.sampling.host.truncation import choose
from model_service.engine.sampling.result import StepResult
from model_service.engine.sequence import Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow
from model_service.model.cpu.layers import Scan

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class HostSampling:
    """A step's logits, which are sampled when the result is read; no state outlives the step."""

    rows: list[LogitRow]
    logits: torch.Tensor  # [rows, vocab]
    scan: Scan | None = None  # of the logits

    def read(self) -> StepResult:
        """Draws and scores; waits for the logits."""
        finite = finite_rows(self.logits, self.scan)
        chosen = self._draw(
            [i for i, row in enumerate(self.rows) if finite[i] and not row.in_prompt]
        )
        tokens, failed = _accepted(self.rows, chosen, finite)
        return StepResult.of(self.rows, tokens.items(), self._score(tokens, failed), failed)

    def _draw(self, wanted: list[int]) -> dict[int, int]:
        """One token for each of the rows `wanted`."""
        if not wanted:
            return {}
        rows = [_sampling_row(self.rows[i]) for i in wanted]
        if self.scan is not None and all(row.takes_largest for row in rows):
            tokens = [self.scan.largest[i] for i in wanted]
        else:
            tokens = sample(self._select(wanted), rows)
        return dict(zip(wanted, tokens, strict=True))

    def _score(
        self, tokens: dict[int, int], failed: dict[Sequence, int]
    ) -> dict[int, TokenLogprobs]:
        """The logprobs that are wanted, by row."""
        targets: dict[int, int] = {}
        for i, row in enumerate(self.rows):
            sequence = row.sequence
            if sequence in failed:
                continue
            if row.in_prompt:
                targets[i] = sequence.tokens[row.position]
            elif sequence.request.logprobs and i in tokens:
                targets[i] = tokens[i]
        if not targets:
            return {}
        requests = [self.rows[i].sequence.request for i in targets]
        entries = score(
            self._select([*targets]),
            [*targets.values()],
            [request.top_logprobs for request in requests],
            [request.logprob_token_ids for request in requests],
        )
        return dict(zip(targets, entries, strict=True))

    def _select(self, rows: list[int]) -> torch.Tensor:
        return self.logits if len(rows) == len(self.rows) else self.logits[rows]


def _accepted(
    rows: list[LogitRow], chosen: dict[int, int], finite: list[bool]
) -> tuple[dict[int, int], dict[Sequence, int]]:
    """The tokens by row as far as drafts hold, and the sequences that fail, with the position."""
    tokens: dict[int, int] = {}
    failed: dict[Sequence, int] = {}
    complete: set[Sequence] = set()
    for i, row in enumerate(rows):
        sequence = row.sequence
        if sequence in complete:  # this row follows a wrong draft
            continue
        if not finite[i]:
            complete.add(sequence)
            # Behind a draft, the next step will tell whether it also fails without.
            if row.drafts_before <= 0:
                failed[sequence] = row.position
        elif i in chosen:
            token = tokens[i] = chosen[i]
            right = row.drafts[row.drafts_before :][:1] == [token]
            if not right or token in sequence.request.stop_ids:
                complete.add(sequence)
    return tokens, failed


def _sampling_row(row: LogitRow) -> SamplingRow:
    sequence, before = row.sequence, row.drafts_before
    request = sequence.request
    tokens = sequence.tokens + row.drafts[:before] if before else sequence.tokens
    return SamplingRow(request.sampling, tokens, request.answer_start, request.stop_ids)


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    """The next token of each row.

    Args:
        logits: [rows, vocab] float32, finite.
        rows: one per row of logits.
    """
    logits = apply_penalties(logits, rows)
    random = [index for index, row in enumerate(rows) if not row.params.greedy]
    if not random:
        return _argmax(logits)
    if len(random) == len(rows):
        return _draw(logits, rows)
    tokens = dict(zip(random, _draw(logits[random], [rows[i] for i in random]), strict=True))
    greedy = [index for index in range(len(rows)) if index not in tokens]
    tokens |= zip(greedy, _argmax(logits[greedy]), strict=True)
    return [tokens[index] for index in range(len(rows))]


def finite_rows(logits: torch.Tensor, scan: Scan | None = None) -> list[bool]:
    """For each row of [rows, vocab] whether all of its logits are finite."""
    if scan is not None:
        return scan.finite
    # On a CPU a sum is 20 times cheaper than looking at each logit, and no NaN or infinity gets
    # lost in it; where large numbers made it overflow, the second look tells.
    finite = np.isfinite(logits.sum(dim=-1).cpu().numpy())
    if not finite.all():
        suspects = logits[torch.from_numpy(~finite).to(logits.device)]
        finite[~finite] = torch.isfinite(suspects).all(dim=-1).cpu().numpy()
    return list(map(bool, finite))


def _argmax(logits: torch.Tensor) -> list[int]:
    """The lowest id among the largest logits of each row."""
    if logits.device.type == "cpu":  # where numpy's is 8 times faster
        return [int(token) for token in logits.numpy().argmax(axis=-1)]
    return [int(token) for token in logits.argmax(dim=-1).tolist()]


def _draw(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    params = [row.params for row in rows]
    columns = draw_columns(params, [len(row.tokens) for row in rows], logits.shape[-1])
    temperature = temperature_column(params)
    scaled = logits / torch.from_numpy(temperature).to(logits.device)
    if temperature.min() < 1e-6:
        scaled.clamp_(-_LARGEST, _LARGEST)
    # In place: touching fresh megabytes takes longer than the exponentials.
    probabilities = torch.softmax(scaled, dim=-1, out=scaled)
    return [int(token) for token in choose(probabilities, columns)]
