"""The order of measurements, and what they come to.

Within a round every contender runs every case once, in an order that is shuffled anew, so that a
machine that grows slower or warmer does not favour whoever came first.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.report import Row, Value
from bench.summary import ratio, summarize


@dataclass(frozen=True, slots=True)
class Case:
    """Something that every contender is asked to do."""

    kind: str  # prefill or decode
    size: int  # tokens of the prompt, or sequences at once

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}"

    def rate(self, seconds: Sequence[float]) -> float:
        """Tokens per second, of the seconds that a worker answered."""
        tokens = self.size if self.kind == "prefill" else self.size * len(seconds)
        return tokens / sum(seconds)


def parse_case(name: str) -> Case:
    """Raises ValueError unless `name` is prefill-N or decode-N."""
    kind, _, size = name.partition("-")
    if kind not in ("prefill", "decode") or not size.isdecimal() or int(size) < 1:
        raise ValueError(f"{name}: name a case as prefill-512 or decode-8")
    return Case(kind, int(size))


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement to take."""

    round: int
    case: Case
    contender: str
    seed: int  # of the prompts: equal for all contenders of a round and case


def schedule(
    contenders: Sequence[str], cases: Sequence[Case], rounds: int, seed: int
) -> Iterator[Turn]:
    """All turns, round by round, case by case, contenders in shuffled order."""
    source = random.Random(seed)
    for number in range(rounds):
        for case in cases:
            prompts = source.getrandbits(32)
            for contender in source.sample(list(contenders), len(contenders)):
                yield Turn(number, case, contender, prompts)


def rows(
    rates: Mapping[tuple[str, str], Sequence[float]],
    references: Mapping[str, str],
) -> list[Row]:
    """A row per case and contender.

    Args:
        rates: tokens per second of each round, by case and contender.
        references: whom each contender is divided by; their order is the table's.
    """
    cases = dict.fromkeys(case for case, _ in rates)
    result = []
    for case, contender in itertools.product(cases, references):
        values = rates.get((case, contender))
        if not values:
            continue
        summary = summarize(values)
        reference = rates.get((case, references[contender])) or None
        compared: dict[str, Value] = {
            "tokens_per_s": summary.median,
            "tokens_per_s_low": summary.low,
            "tokens_per_s_high": summary.high,
            "rounds": summary.count,
            "over_chasqui": None if reference is None else ratio(values, reference),
        }
        result.append(Row(case, {"contender": contender}, compared))
    return result
