"""When the draft model drafts, and for which sequences.

It drafts where that makes more tokens per second by all that is known about chances and times. A
ledger of what it costs and saves stops it if that knowledge is wrong, and pays for trials: single
drafts that show whether it would pay again.
"""

from collections.abc import Mapping

from model_service.engine.scheduling.speculation.acceptance import Acceptance
from model_service.engine.scheduling.speculation.costs import DraftCosts
from model_service.engine.scheduling.speculation.drafters import ModelSource
from model_service.engine.scheduling.speculation.ledger import DraftLedger
from model_service.engine.scheduling.speculation.lengths import Rate, draft_lengths
from model_service.engine.sequence import Sequence

# The model drafts if the rate grows at least by this factor: estimates are noisy, and of those that
# promise a little most are wrong.
MIN_GAIN = 1.08
# Tokens of an answer within which computing a sequence's backlog has to pay.
PAYBACK = 128


class ModelDrafts:
    """Decides what the model does in a step, and has it done."""

    def __init__(self, model: ModelSource) -> None:
        self.model = model
        self.seconds = 0.0  # that the model took for the last proposal
        self.on_trial = False  # whether that was made only to learn
        self._ledger = DraftLedger()

    def step(self) -> None:
        """Records that a step begins."""
        self._ledger.step()

    def propose(
        self,
        rooms: Mapping[Sequence, int],
        acceptance: Mapping[Sequence, Acceptance],
        without: Rate,
        costs: DraftCosts,
        *,
        busy: bool,
    ) -> dict[Sequence, list[int]]:
        """Drafts for some of the sequences that decode.

        Args:
            rooms: most drafts of each sequence, at least 1.
            acceptance: of the model's drafts, for each of these sequences.
            without: the step without these drafts.
            costs: of drafts in it.
            busy: whether it computes prompts: then no long backlog is computed.
        """
        self.seconds = 0.0
        if not costs.seconds or self._ledger.balance <= 0:
            return {}
        wanted = self._worthwhile(rooms, acceptance, without, costs)
        self.on_trial = not wanted
        wanted = wanted or self._trial(acceptance, costs)
        if not wanted:
            return {}
        extra = 0 if busy else costs.extra_tokens()
        backlog = sum(self.model.backlog(sequence) - 1 for sequence in wanted)
        before = self.model.seconds
        drafts = self.model.propose(wanted, extra)
        self.seconds = self.model.seconds - before
        # Not the measured time: the usual times of steps and drafts alone can be compared.
        rounds = max([1, *map(len, drafts.values())])  # a backlog is computed in the first
        checked = sum(map(len, drafts.values()))
        self._ledger.spend(
            rounds * costs.round + min(backlog, extra) * costs.token + checked * costs.row
        )
        return drafts

    def accepted(self, count: int, rows: int) -> None:
        """Records drafts that were right, in a step of `rows` sequences: each saved one a step."""
        self._ledger.save(count / rows)

    def _worthwhile(
        self,
        rooms: Mapping[Sequence, int],
        acceptance: Mapping[Sequence, Acceptance],
        without: Rate,
        costs: DraftCosts,
    ) -> dict[Sequence, int]:
        """The numbers of drafts that make the rate highest; none if it hardly grows."""
        sequences = [*rooms]
        lengths, rate = draft_lengths(
            [acceptance[each].chance for each in sequences],
            [*rooms.values()],
            without,
            row_cost=costs.row,
            round_cost=costs.round,
            longest=costs.spare,
            everyone=costs.rows,
        )
        gain = rate.per_step / without.per_step
        if gain < MIN_GAIN:
            return {}
        saved = (1 - 1 / gain) / costs.rows  # by a token, in steps
        return {
            sequence: length
            for sequence, length in zip(sequences, lengths, strict=True)
            if length
            and (self.model.backlog(sequence) - 1) * costs.token
            <= saved * min(PAYBACK, sequence.limit - len(sequence.tokens))
        }

    def _trial(
        self, acceptance: Mapping[Sequence, Acceptance], costs: DraftCosts
    ) -> dict[Sequence, int]:
        """A draft for the sequence about which least is known, if the ledger has enough for it."""
        sequence = min(acceptance, key=lambda each: acceptance[each].weight)
        backlog = (self.model.backlog(sequence) - 1) * costs.token
        return {sequence: 1} if self._ledger.balance > backlog + costs.round + costs.row else {}
