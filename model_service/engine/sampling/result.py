"""What a step made: tokens, logprobs, and which sequences cannot go on.

Here it is read from the logits at once, on the host: the way that can tell whether drafts hold.
`DeviceSampler` makes the same without drafts, and without the host knowing a token.
"""

from dataclasses import dataclass

import torch

from model_service.engine.sampling.host_sampler import SamplingRow, finite_rows, sample, score
from model_service.engine.sequence import Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step's rows of logits."""

    tokens: dict[Sequence, list[tuple[int, int]]]  # token, and its row
    # Where a logit that counts was not finite: the position of the token that it was for.
    failed: dict[Sequence, int]
    scores: dict[int, TokenLogprobs]  # by row, where they are wanted; a prompt's in order


def read_result(rows: list[LogitRow], logits: torch.Tensor) -> StepResult:
    """Draws and scores; waits for the logits [len(rows), vocab]."""
    result = _draw(rows, logits)
    result.scores.update(_score(rows, logits, result))
    return result


def _draw(rows: list[LogitRow], logits: torch.Tensor) -> StepResult:
    """The next tokens of each sequence whose end the step reached, as far as drafts hold."""
    finite = finite_rows(logits)
    wanted = [i for i, row in enumerate(rows) if finite[i] and not row.in_prompt]
    selected = logits if len(wanted) == len(rows) else logits[wanted]
    chosen = sample(selected, [_sampling_row(rows[i]) for i in wanted]) if wanted else []
    tokens = dict(zip(wanted, chosen, strict=True))
    result = StepResult({}, {}, {})
    complete: set[Sequence] = set()
    for i, row in enumerate(rows):
        sequence = row.sequence
        if sequence in complete:  # what a wrong draft led to
            continue
        if not finite[i]:
            complete.add(sequence)
            # Behind a draft, the next step will see whether it is so without.
            if row.drafts_before <= 0:
                result.failed[sequence] = row.position
        elif i in tokens:
            result.tokens.setdefault(sequence, []).append((tokens[i], i))
            right = row.drafts[row.drafts_before :][:1] == [tokens[i]]
            if not right or tokens[i] in sequence.request.stop_ids:
                complete.add(sequence)
    return result


def _score(
    rows: list[LogitRow], logits: torch.Tensor, result: StepResult
) -> dict[int, TokenLogprobs]:
    made = {i: token for tokens in result.tokens.values() for token, i in tokens}
    targets: dict[int, int] = {}
    for i, row in enumerate(rows):
        sequence = row.sequence
        if sequence in result.failed:
            continue
        if row.in_prompt:
            targets[i] = sequence.tokens[row.position]
        elif sequence.request.logprobs and i in made:
            targets[i] = made[i]
    if not targets:
        return {}
    selected = logits if len(targets) == len(rows) else logits[[*targets]]
    alternatives = [rows[i].sequence.request.top_logprobs for i in targets]
    entries = score(selected, [*targets.values()], alternatives)
    return dict(zip(targets, entries, strict=True))


def _sampling_row(row: LogitRow) -> SamplingRow:
    sequence, before = row.sequence, row.drafts_before
    request = sequence.request
    tokens = sequence.tokens + row.drafts[:before] if before else sequence.tokens
    answer_start = len(request.prompt_ids) - request.offset
    return SamplingRow(request.sampling, tokens, answer_start, request.stop_ids)
