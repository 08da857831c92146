"""Turns a schedule into the flat batch of a step, and says what each row of its logits is for."""

from typing import NamedTuple

import numpy as np

from model_service.engine.scheduling.schedule import Chunk, Schedule
from model_service.engine.sequence import Sequence
from model_service.engine.step.plan import StepPlan
from model_service.model.attention.backend import SequenceSpan


class LogitRow(NamedTuple):  # one per sequence and step: a frozen dataclass is slower to create
    """One row of a step's logits: predicts the token at `position` of its sequence.

    Past the sequence's last token, the first of `drafts` stand before that position.
    """

    sequence: Sequence
    position: int
    drafts: list[int]

    @property
    def drafts_before(self) -> int:
        """How many drafts stand between the sequence's last token and the predicted one."""
        return self.position - len(self.sequence.tokens)

    @property
    def in_prompt(self) -> bool:
        """Whether the predicted token stands in the prompt: only its logprob is wanted."""
        return self.position < len(self.sequence.request.prompt_ids)


def plan_step(schedule: Schedule, *, lookahead: bool = False) -> tuple[StepPlan, list[LogitRow]]:
    """The step's plan, and its rows of logits.

    Args:
        schedule: the step's work.
        lookahead: whether the next step takes the tokens that this one samples from the device.
    """
    # Most chunks are a last token: comprehensions, as there may be hundreds of them in each step.
    plain = schedule.chunks[: 0 if schedule.drafted_tokens else schedule.decode_rows]
    spans = [SequenceSpan(1, chunk.end, chunk.sequence.block_table) for chunk in plain]
    tokens = [chunk.sequence.tokens[chunk.begin] for chunk in plain]
    logit_rows = [i for i, chunk in enumerate(plain) if chunk.sequence.limit > chunk.end]
    rows = [LogitRow(plain[i].sequence, plain[i].end, plain[i].drafts) for i in logit_rows]
    for chunk in schedule.chunks[len(plain) :]:
        sequence, begin, end, drafts = chunk.sequence, chunk.begin, chunk.end, chunk.drafts
        wanted = _rows(chunk)
        rows += wanted
        logit_rows += [len(tokens) + row.position - 1 - begin for row in wanted]
        tokens += sequence.tokens[begin:end] + drafts
        context = end + len(drafts)
        spans.append(SequenceSpan(context - begin, context, sequence.block_table))
    plan = StepPlan(
        tuple(spans),
        np.array(tokens, dtype=np.int32),
        np.array(logit_rows, dtype=np.int32),
        num_sampled=sum([not row.in_prompt for row in rows]) if lookahead else 0,
        copies=tuple(schedule.copies),
    )
    return plan, rows


def _rows(chunk: Chunk) -> list[LogitRow]:
    """The positions whose logits a chunk must give: unscored prompt tokens, and the next tokens."""
    sequence, end = chunk.sequence, chunk.end
    # Logits at index i predict the token at position i + 1.
    first = max(chunk.begin + 1, sequence.unscored)
    positions = [*range(first, min(end + 1, len(sequence.request.prompt_ids)))]
    if end == len(sequence.tokens) and sequence.generates:
        positions += range(end, end + len(chunk.drafts) + 1)
    return [LogitRow(sequence, position, chunk.drafts) for position in positions]
