"""Distributions of prompt and answer lengths in tokens, and their spelling in flags.

Drawn lengths are not bounded; `workload` clips them to the context length.
"""

import math
import re
from dataclasses import dataclass
from random import Random

FORMS = "128, uniform:16-512 or lognormal:200,0.5 (median, sigma)"
MAX_SIGMA = 5.0

_CONSTANT = re.compile(r"\d+")
_UNIFORM = re.compile(r"uniform:(\d+)-(\d+)")
_LOG_NORMAL = re.compile(r"lognormal:(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same length."""

    tokens: int

    def __str__(self) -> str:
        return str(self.tokens)

    def draw(self, _random: Random) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `high`, both included, is equally likely."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"uniform:{self.low}-{self.high}"

    def draw(self, random: Random) -> int:
        return random.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Log-normal: half are below `median`, and `sigma` is the deviation of the logarithm.

    Lengths of prompts and answers in recorded traffic have about this distribution.
    """

    median: float
    sigma: float

    def __str__(self) -> str:
        return f"lognormal:{self.median:g},{self.sigma:g}"

    def draw(self, random: Random) -> int:
        return round(random.lognormvariate(math.log(self.median), self.sigma))


Lengths = Constant | Uniform | LogNormal


def parse(text: str) -> Lengths:
    """The distribution that `text` spells. ValueError: it is none of FORMS, or out of range."""
    if _CONSTANT.fullmatch(text):
        _check_positive(int(text))
        return Constant(int(text))
    if found := _UNIFORM.fullmatch(text):
        low, high = int(found[1]), int(found[2])
        _check_positive(low)
        if low > high:
            raise ValueError(f"{low} is above {high}")
        return Uniform(low, high)
    if found := _LOG_NORMAL.fullmatch(text):
        median, sigma = float(found[1]), float(found[2])
        _check_positive(median)
        if sigma > MAX_SIGMA:
            raise ValueError(f"sigma must be at most {MAX_SIGMA:g}, not {sigma!r}")
        return LogNormal(median, sigma)
    raise ValueError(f"must be {FORMS}, not {text!r}")


def _check_positive(tokens: float) -> None:
    if tokens < 1:
        raise ValueError(f"must be at least 1 token, not {tokens!r}")
