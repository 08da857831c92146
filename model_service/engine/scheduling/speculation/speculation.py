"""Speculation: drafts the next tokens of sequences, so that one step may make several.

A draft is checked in the step that computes it: it is accepted if it is the token that sampling
draws there. So drafts change how fast an answer comes, and its tokens only by rounding: the number
of rows in a step changes the last bits of the logits. This module decides which source drafts for a
sequence, and learns how often each is right. A draft costs a row of the step, one of the model also
the model's time, and an accepted one saves its sequence a whole step.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.speculation.acceptance import Acceptance
from model_service.engine.scheduling.speculation.costs import DraftCosts
from model_service.engine.scheduling.speculation.drafters import (
    DraftCount,
    ModelSource,
    NgramSource,
    Source,
)
from model_service.engine.scheduling.speculation.lengths import Rate
from model_service.engine.scheduling.speculation.model_drafts import ModelDrafts
from model_service.engine.scheduling.speculation.row_costs import RowCosts
from model_service.engine.sequence import Sequence

# Share of its weight that an observation keeps when another comes: in a sequence, and over all.
MEMORY, OVERALL_MEMORY = 0.95, 0.98
# The weight of what is expected of a new sequence, in observations.
PRIOR_WEIGHT = 4.0
FIRST_CHANCE = 0.5
# After so many steps in which nothing was worth drafting, one step in LOOK_EVERY is considered:
# with a small network, looking itself takes some percent of a step.
IDLE_STEPS, LOOK_EVERY = 16, 4
# One step in so many is made without drafts, because all costs are relative to such a step.
PLAIN_EVERY = 64


@dataclass(slots=True)
class _Track:
    """The drafts of one sequence, and how often they were right."""

    acceptance: dict[Source, Acceptance]
    drafts: dict[Source, list[int]] = field(default_factory=dict)  # for the next step
    computed: Source = Source.NGRAM  # the source of those that are in the step, if any are
    rows: int = 1  # of the step


class Speculation:
    """Proposes drafts, and learns for which sequences they are worth their cost."""

    def __init__(
        self,
        ngrams: NgramSource,
        prefill_budget: PrefillBudget,
        most: int,
        model: ModelSource | None = None,
    ) -> None:
        """Proposes at most `most` tokens for a sequence in a step; 0 turns it off."""
        self._ngrams = ngrams
        self._model = None if model is None else ModelDrafts(model)
        self._prefill_budget = prefill_budget
        self._most = most
        self._idle_steps = 0  # in a row without drafts
        self._steps_with_drafts = 0  # in a row
        self._row_costs = RowCosts()
        self._tracks: dict[Sequence, _Track] = {}
        # The chance of the model's drafts in a new sequence.
        self._overall = Acceptance.expecting(FIRST_CHANCE, PRIOR_WEIGHT, OVERALL_MEMORY)
        self.seconds = 0.0  # that the model took for the last proposal
        self.counts = dict.fromkeys(Source, DraftCount())

    def propose(self, rooms: Mapping[Sequence, int], *, busy: bool) -> dict[Sequence, list[int]]:
        """Tokens to compute behind the last ones of the sequences that decode in the next step.

        Drafts of n-grams that are not worth computing are made, too, and compared with the tokens
        that come: so speculation finds out at no cost when they would pay again.

        Args:
            rooms: the most tokens that each of these sequences may take.
            busy: whether the step computes prompts.
        """
        self.seconds = 0.0
        if not self._most or not rooms:
            return {}
        if self._model is not None:
            self._model.step()
        self._idle_steps += 1
        self._steps_with_drafts += 1
        if self._steps_with_drafts == PLAIN_EVERY:
            self._steps_with_drafts = 0
            return {}
        # A skipped step compares no guesses either.
        idle = self._idle_steps > IDLE_STEPS and self._idle_steps % LOOK_EVERY
        drafts = {} if idle else self._considered(rooms, busy=busy)
        if not drafts:
            self._steps_with_drafts = 0
        return drafts

    def checked(self, rows: int, drafted: int, seconds: float) -> None:
        """Records the time of a step of `rows` sequences that checked drafts and had no prompts."""
        if usual := self._prefill_budget.step_seconds(rows):
            self._row_costs.record(rows, drafted, seconds / usual)

    def _considered(
        self, rooms: Mapping[Sequence, int], *, busy: bool
    ) -> dict[Sequence, list[int]]:
        model = None if self._model is None else self._model.model
        costs = DraftCosts.of(len(rooms), self._prefill_budget, self._row_costs, model)
        if costs.too_high:
            return {}
        drafts: dict[Sequence, list[int]] = {}
        for_model: dict[Sequence, int] = {}  # rooms of sequences that are better off with it
        without = Rate(len(rooms), 1.0)
        for sequence, room in rooms.items():
            track = self._track(sequence, len(rooms))
            guesses = self._ngrams.propose(sequence, self._most)
            track.drafts[Source.NGRAM] = guesses
            most = min(room, self._most)
            chance = track.acceptance[Source.NGRAM].chance
            length, rate = costs.alone(chance, min(most, len(guesses)), by_model=False)
            if length:
                drafts[sequence] = guesses[:length]
                self._idle_steps = 0
            by_model = track.acceptance[Source.MODEL].chance
            if (
                self._model is not None
                and most
                and (
                    not length
                    or costs.alone(by_model, most, by_model=True)[1].per_step > rate.per_step
                )
            ):
                for_model[sequence] = most
            elif length:
                made = sum(chance**i for i in range(1, length + 1))
                without = Rate(without.tokens + made, without.time + length * costs.row)
        if self._model is not None and for_model:
            drafts |= self._by_model(self._model, for_model, without, costs, busy=busy)
        return drafts

    def learn(self, sequence: Sequence, drafts: Tokens[int], made: Tokens[int]) -> None:
        """Compares the step's drafts with the tokens that it made for the sequence."""
        track = self._tracks.get(sequence)
        if track is None or not track.drafts:
            return
        for source, guesses in track.drafts.items():
            for guess, token in zip(guesses, made, strict=False):
                track.acceptance[source].observe(right=guess == token)
                if source is Source.MODEL:
                    self._overall.observe(right=guess == token)
        track.drafts = {}
        accepted = max(0, min(len(drafts), len(made) - 1))
        count = self.counts[track.computed]
        self.counts[track.computed] = DraftCount(
            count.drafted + len(drafts), count.accepted + accepted
        )
        if self._model is not None and track.computed is Source.MODEL:
            self._model.accepted(accepted, track.rows)

    def forget(self, sequence: Sequence) -> None:
        """Drops all that is held for a sequence that has ended."""
        self._ngrams.forget(sequence)
        if self._model is not None:
            self._model.model.forget(sequence)
        self._tracks.pop(sequence, None)

    def _track(self, sequence: Sequence, rows: int) -> _Track:
        track = self._tracks.get(sequence)
        if track is None:
            track = self._tracks[sequence] = _Track(
                {
                    Source.NGRAM: Acceptance.expecting(FIRST_CHANCE, PRIOR_WEIGHT, MEMORY),
                    Source.MODEL: Acceptance.expecting(self._overall.chance, PRIOR_WEIGHT, MEMORY),
                }
            )
        track.drafts, track.computed, track.rows = {}, Source.NGRAM, rows
        return track

    def _by_model(
        self,
        model: ModelDrafts,
        rooms: Mapping[Sequence, int],
        without: Rate,
        costs: DraftCosts,
        *,
        busy: bool,
    ) -> dict[Sequence, list[int]]:
        acceptance = {each: self._tracks[each].acceptance[Source.MODEL] for each in rooms}
        drafts = model.propose(rooms, acceptance, without, costs, busy=busy)
        self.seconds = model.seconds
        if drafts and not model.on_trial:
            self._idle_steps = 0
        for sequence, guesses in drafts.items():
            track = self._tracks[sequence]
            track.drafts[Source.MODEL], track.computed = guesses, Source.MODEL
        return drafts
