"""Drafts by a small model of the same vocabulary.

Each draft is drawn as the target will draw at its position: from the draft model's logits, with the
request's own parameters and the same random number. So at any temperature the two agree as often as
their distributions let them (Leviathan et al., 2023, accept by a random number of their own
instead, which keeps the distribution but not the tokens of a seed).

The leader alone has the draft model, whole. The plan of a step brings the drafts to the other ranks
as tokens like all others, so these need not know where they come from, and no draft waits for a
sum over ranks.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from model_service.engine.drafting.draft_cache import DraftCache
from model_service.engine.drafting.draft_times import DraftTimes
from model_service.engine.drafting.unsharded import unsharded
from model_service.engine.sampling.host.penalties import SamplingRow
from model_service.engine.sampling.host.sampler import finite_rows, sample_rows
from model_service.engine.sequence import Sequence
from model_service.engine.step.plan import StepPlan
from model_service.engine.step.runner import ModelRunner
from model_service.model.attention.backend import SequenceSpan

# Tokens of a sequence that the last step may have left over: its last one, and the last draft.
USUAL_BACKLOG = 2


@dataclass(slots=True)
class _Draft:
    """The drafts of one sequence in the making."""

    sequence: Sequence
    most: int
    tokens: list[int]  # to be computed next; none if the drafts are complete
    end: int  # the index behind these
    drafts: list[int] = field(default_factory=list)

    @property
    def draws(self) -> bool:
        """Whether the next draft can be drawn when the tokens are computed."""
        return self.end >= len(self.sequence.tokens)

    def row(self) -> SamplingRow:
        request = self.sequence.request
        tokens = self.sequence.tokens + self.drafts
        return SamplingRow(request.sampling, tokens, request.answer_start, request.stop_ids)

    def append(self, token: int) -> None:
        """Adds a draft; behind one that ends the answer none is of use, nor is that one."""
        ends = token in self.sequence.request.stop_ids
        self.drafts += [] if ends else [token]
        self.tokens = [] if ends or len(self.drafts) == self.most else [token]
        self.end += 1


class ModelDrafter:
    """A draft model, its cache, and the times that it takes."""

    def __init__(
        self, runner: ModelRunner, cache: DraftCache, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Takes over the draft model's runner and the bookkeeping of that runner's cache."""
        self.seconds = 0.0  # that drafts took since the start
        self._runner = runner
        self._cache = cache
        self._clock = clock
        self._times = DraftTimes()

    def backlog(self, sequence: Sequence) -> int:
        """Tokens of the sequence that are still to be computed: at least the last one."""
        return len(sequence.tokens) - self._cache.begin(sequence)

    def propose(self, wanted: Mapping[Sequence, int], extra: int) -> dict[Sequence, list[int]]:
        """Drafts at most as many tokens as wanted for each sequence, one for all at a time."""
        started = self._clock()
        begun = drafting = self._begin(wanted, extra)
        while drafting:
            rows, tokens = len(drafting), sum(len(each.tokens) for each in drafting)
            drafting = self._advance(drafting)
            now = self._clock()
            self._times.record(rows, tokens, now - started)
            self.seconds += now - started
            started = now
        return {each.sequence: each.drafts for each in begun if each.drafts}

    def round_seconds(self, sequences: int) -> float | None:
        """The time of one draft for each of that many sequences; None if unknown yet."""
        return self._times.round_seconds(sequences)

    def token_seconds(self) -> float:
        """The time of one token of a long backlog; 0 if unknown yet."""
        return self._times.token_seconds()

    def forget(self, sequence: Sequence) -> None:
        """Gives the blocks of a sequence that has ended back."""
        self._cache.release(sequence)

    def _begin(self, wanted: Mapping[Sequence, int], extra: int) -> list[_Draft]:
        """Drafts of the sequences for which the cache has room, with their backlogs as tokens."""
        begun = []
        for sequence, most in wanted.items():
            begin, length = self._cache.begin(sequence), len(sequence.tokens)
            end = min(length, begin + USUAL_BACKLOG + extra)
            extra -= max(0, end - begin - USUAL_BACKLOG)
            # The last draft is not computed.
            if self._cache.reserve(sequence, length + most - 1):
                begun.append(_Draft(sequence, most, sequence.tokens[begin:end], end))
        return begun

    def _advance(self, drafting: list[_Draft]) -> list[_Draft]:
        """Computes the tokens of all, draws where it can; returns those that go on."""
        lengths = np.array([len(each.tokens) for each in drafting])
        drawing = [each for each in drafting if each.draws]
        plan = StepPlan(
            tuple(
                SequenceSpan(len(each.tokens), each.end, self._cache.table(each.sequence))
                for each in drafting
            ),
            np.array([token for each in drafting for token in each.tokens], dtype=np.int32),
            (lengths.cumsum() - 1)[[each.draws for each in drafting]].astype(np.int32),
        )
        with unsharded():
            logits = self._runner.execute(plan)
        for each in drafting:
            self._cache.record(each.sequence, each.tokens, each.end)
            each.tokens = []
        scan = self._runner.scan
        finite = finite_rows(logits, scan)
        # Some rows may not be: the draft model's weights may overflow where the target's do not.
        rows = {i: each.row() for i, each in enumerate(drawing) if finite[i]}
        tokens = sample_rows(logits, scan, rows)
        drawing = [drawing[i] for i in rows]
        for each, i in zip(drawing, rows, strict=True):
            each.append(tokens[i])
        return [each for each in drawing if each.tokens]
