"""The times that drafts take in a step, relative to that step without drafts."""

from dataclasses import dataclass
from typing import Self

from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.speculation.drafters import ModelSource
from model_service.engine.scheduling.speculation.lengths import Rate, draft_lengths
from model_service.engine.scheduling.speculation.row_costs import RowCosts

# Until they have been measured: to check a draft in a step of one sequence, and to make one.
DEFAULT_ROW, DEFAULT_ROUND = 0.1, 0.2
MAX_EXTRA = 2**20  # tokens, where one takes no measurable time
MIN_EXTRA = 32  # tokens of backlogs that a step computes at least, so that the model catches up


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """Times in steps without drafts, unless said otherwise."""

    rows: int  # sequences that decode
    seconds: float  # of a step without drafts; 0 if unknown yet
    row: float  # to check one draft
    round: float  # of the model, to make one draft for each sequence
    token: float  # of the model, to compute a token of a backlog
    spare: float  # that the model may add to a step beside which other sequences wait

    @classmethod
    def of(
        cls, rows: int, budget: PrefillBudget, checked: RowCosts, model: ModelSource | None
    ) -> Self:
        """The costs in a step of `rows` sequences, by what is known of prompts and of `checked`."""
        cost, seconds = checked.cost(rows) or budget.cost(rows), budget.step_seconds(rows) or 0.0
        made = None if model is None else model.round_seconds(rows)
        known = model is not None and seconds > 0
        return cls(
            rows,
            seconds,
            row=DEFAULT_ROW / rows if cost is None else cost,
            round=made / seconds if made is not None and seconds else DEFAULT_ROUND,
            token=model.token_seconds() / seconds if model is not None and known else 0.0,
            spare=budget.max_stall - 1,
        )

    @property
    def too_high(self) -> bool:
        """Whether no draft is worth a row of the step, even if it is right."""
        return self.row * self.rows >= 1

    def alone(self, chance: float, most: int, *, by_model: bool) -> tuple[int, Rate]:
        """The best number of drafts for a sequence, if all sequences do as this one.

        Args:
            chance: that a draft is right.
            most: drafts.
            by_model: whether the model makes them.
        """
        cost = self.row * self.rows
        round_cost = self.round if by_model else 0.0
        without = Rate(1.0, 1.0)
        if chance <= cost + round_cost:  # the first draft is worth most
            return 0, without
        (length,), rate = draft_lengths(
            [chance], [most], without, row_cost=cost, round_cost=round_cost
        )
        return length, rate

    def extra_tokens(self) -> int:
        """Tokens of backlogs that a step computes besides those of the last step."""
        if not self.token:
            return MIN_EXTRA
        return int(min(max(MIN_EXTRA, self.spare / self.token), MAX_EXTRA))
