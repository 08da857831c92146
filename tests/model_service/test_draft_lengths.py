"""When drafts are made, and how many: on simulated times, so that no test depends on real ones."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model_service.engine.drafting.ngram_drafter import NgramDrafter
from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.speculation.lengths import Rate, draft_lengths
from model_service.engine.scheduling.speculation.speculation import Speculation
from model_service.engine.sequence import GenerationRequest, Sequence

MOST = 8
STEP = 0.01  # seconds of a step without drafts
chances = st.floats(0.0, 0.99)
costs = st.floats(0.001, 1.0)


def rate_of(
    chances: list[float], lengths: tuple[int, ...], row_cost: float, round_cost: float
) -> float:
    """Tokens in the time of a step without drafts."""
    tokens = sum(
        sum(chance**i for i in range(length + 1))
        for chance, length in zip(chances, lengths, strict=True)
    )
    return tokens / (1 + sum(lengths) * row_cost + max(lengths) * round_cost)


@given(chance=chances, room=st.integers(0, 12), row_cost=costs, round_cost=costs)
def test_one_sequence_gets_the_number_of_drafts_with_the_highest_rate(
    chance: float, room: int, row_cost: float, round_cost: float
) -> None:
    (length,), rate = draft_lengths(
        [chance], [room], Rate(1, 1), row_cost=row_cost, round_cost=round_cost
    )
    rates = [rate_of([chance], (each,), row_cost, round_cost) for each in range(room + 1)]
    assert rate.per_step == pytest.approx(rates[length])
    assert rates[length] == pytest.approx(max(rates))


@given(
    sequences=st.lists(st.tuples(chances, st.integers(0, 3)), min_size=1, max_size=3),
    row_cost=costs,
    round_cost=costs,
)
def test_no_sequence_gets_more_than_its_room_and_drafts_never_lower_the_rate(
    sequences: list[tuple[float, int]], row_cost: float, round_cost: float
) -> None:
    of_each, rooms = [chance for chance, _ in sequences], [room for _, room in sequences]
    without = Rate(len(sequences), 1)
    lengths, rate = draft_lengths(of_each, rooms, without, row_cost=row_cost, round_cost=round_cost)
    assert all(length <= room for length, room in zip(lengths, rooms, strict=True))
    assert rate.per_step == pytest.approx(rate_of(of_each, tuple(lengths), row_cost, round_cost))
    assert rate.per_step >= without.per_step


@pytest.mark.parametrize(("rooms", "rounds"), [([8, 8], 8), ([8, 2], 2), ([8, 0], 2)])
def test_no_sequence_waits_long_for_the_drafts_of_others(rooms: list[int], rounds: int) -> None:
    without = Rate(2, 1)
    lengths, _ = draft_lengths(
        [0.99, 0.99], rooms, without, row_cost=0.001, round_cost=0.3, longest=0.7, everyone=2
    )
    assert max(lengths) == rounds


class SimulatedModel:
    """A draft model whose drafts are right by chance; it computes no token but its time."""

    def __init__(self, chance: float, round_cost: float, token_cost: float, seed: int) -> None:
        self.seconds = 0.0
        self.chance = chance
        self._round, self._token = round_cost * STEP, token_cost * STEP
        self._random = random.Random(seed)
        self._computed: dict[Sequence, int] = {}

    def backlog(self, sequence: Sequence) -> int:
        return len(sequence.tokens) - self._computed.get(sequence, 0)

    def propose(self, wanted: Mapping[Sequence, int], extra: int) -> dict[Sequence, list[int]]:
        drafts = {}
        for sequence, most in wanted.items():
            backlog = self.backlog(sequence)
            done = min(backlog, extra + 2)
            extra -= max(0, done - 2)
            self.seconds += (done - 1) * self._token  # a round computes the last token
            self._computed[sequence] = len(sequence.tokens) - backlog + done
            if done == backlog:
                drafts[sequence] = [self._draft() for _ in range(most)]
        self.seconds += self._round * max(map(len, drafts.values()), default=1)
        return drafts

    def _draft(self) -> int:
        return RIGHT if self._random.random() < self.chance else WRONG

    def round_seconds(self, sequences: int) -> float | None:
        return self._round

    def token_seconds(self) -> float:
        return self._token

    def forget(self, sequence: Sequence) -> None:
        self._computed.pop(sequence, None)


RIGHT, WRONG = 7, 8
FRESH = iter(range(1000, 10**9))  # tokens that stand nowhere else: n-grams have nothing to say


def speed_up(
    model: SimulatedModel, row_cost: float, streams: int = 1, answers: int = 12, length: int = 100
) -> float:
    """The rate of a simulated engine with the model over that without."""
    budget = PrefillBudget(1.7, 16, 512)
    speculation = Speculation(NgramDrafter(), budget, MOST, model)
    seconds, made = 0.0, 0
    for _ in range(answers):
        running = [
            Sequence.from_request(
                GenerationRequest(0, tuple(next(FRESH) for _ in range(40)), length), 10**6, 0
            )
            for _ in range(streams)
        ]
        while running:
            rooms = {each: each.limit - len(each.tokens) - 1 for each in running}
            drafts = speculation.propose(rooms, busy=False)
            drafted = sum(map(len, drafts.values()))
            step = STEP * (1 + row_cost * drafted)
            if drafted:
                speculation.checked(len(running), drafted, step)
            else:
                budget.record(len(running), 0, step)
            seconds += step + speculation.seconds
            for each in running:
                guesses = drafts.get(each, [])
                right = next((i for i, x in enumerate(guesses) if x != RIGHT), len(guesses))
                ids = [*guesses[:right], next(FRESH)]
                speculation.learn(each, guesses, ids)
                each.tokens += [next(FRESH)] * len(ids)
                made += len(ids)
            for each in [each for each in running if len(each.tokens) >= each.limit]:
                speculation.forget(each)
                running.remove(each)
    return made * STEP / streams / seconds


@pytest.mark.parametrize(
    ("streams", "chance", "round_cost", "least"),
    [(1, 0.6, 0.1, 1.3), (1, 0.8, 0.2, 1.5), (1, 0.95, 0.1, 3.0), (4, 0.8, 0.2, 1.3)],
)
def test_right_drafts_make_answers_faster(
    streams: int, chance: float, round_cost: float, least: float
) -> None:
    model = SimulatedModel(chance, round_cost, token_cost=0.01, seed=1)
    assert speed_up(model, row_cost=0.03 / streams, streams=streams) > least


@given(
    chance=st.floats(0.0, 1.0),
    round_cost=st.floats(0.02, 2.0),
    token_cost=st.floats(0.0, 0.1),
    row_cost=st.floats(0.001, 1.0),
    streams=st.sampled_from([1, 8]),
    seed=st.integers(0, 100),
)
@settings(max_examples=12)
@example(chance=0.5, round_cost=0.1, token_cost=5e-324, row_cost=0.1, streams=1, seed=0)
# A backlog costs more than the share of time that drafts get while its answer is made.
@example(chance=0.0, round_cost=0.0625, token_cost=0.09375, row_cost=0.125, streams=1, seed=0)
@example(chance=0.125, round_cost=0.0625, token_cost=0.0625, row_cost=0.03125, streams=1, seed=1)
def test_answers_are_hardly_ever_slower_with_a_draft_model(
    chance: float, round_cost: float, token_cost: float, row_cost: float, streams: int, seed: int
) -> None:
    model = SimulatedModel(chance, round_cost, token_cost, seed)
    assert speed_up(model, row_cost, streams) > 0.97
