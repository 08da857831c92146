"""A step's sampling on the host: tokens as far as drafts hold, and the logprobs that are wanted."""

from dataclasses import dataclass

import torch

from model_service.engine.sampling.host.logprobs import score
from model_service.engine.sampling.host.penalties import SamplingRow
from model_service.engine.sampling.host.sampler import finite_rows, sample_rows
from model_service.engine.sampling.result import StepResult
from model_service.engine.sequence import Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow
from model_service.model.cpu.layers import Scan


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
        rows = {i: _sampling_row(self.rows[i]) for i in wanted}
        return sample_rows(self.logits, self.scan, rows)

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
