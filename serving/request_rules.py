"""The rules for a generation request, and the defaults of its fields.

The gateway, the model service and `llama.Llama` use these, so they refuse the same values with the
same words. Fractions are compared as 32-bit floats, the type of the contract's fields. Ranges are
written `low <= x <= high`, because `x < low or x > high` is false for NaN.
"""

import ctypes
import itertools
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat, cast

from llama.v1.sampling_pb2 import SamplingParams
from serving.errors import Violation
from serving.numbers import format_float32

DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.9
DEFAULT_MIN_P = 0.0
DEFAULT_REPETITION_PENALTY = 1.0
DEFAULT_PRESENCE_PENALTY = 0.0
DEFAULT_FREQUENCY_PENALTY = 0.0

MAX_TOP_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class FloatRule:
    """A number from `low` to `high`, both allowed unless `above_low`."""

    low: float
    high: float
    above_low: bool = False

    def problem(self, value: object) -> str | None:
        """The rule that `value` breaks, or None."""
        number = as_float32(value)
        if number is None:
            return f"must be a number, not {reprlib.repr(value)}"
        inside = self.low <= number <= self.high and not (self.above_low and number == self.low)
        return None if inside else f"must be {self}, not {format_float32(number)}"

    def __str__(self) -> str:
        low, high = format_float32(self.low), format_float32(self.high)
        return f"above {low} and at most {high}" if self.above_low else f"{low} to {high}"


@dataclass(frozen=True, slots=True)
class IntegerRule:
    """An integer from `low` to the largest that the contract's field can hold."""

    low: int
    high: int = MAX_UINT32
    advice: str = ""

    def problem(self, value: object) -> str | None:
        """The rule that `value` breaks, or None."""
        number = as_integer(value)
        if number is None:
            return f"must be an integer, not {reprlib.repr(value)}"
        if number < self.low:
            return f"must be at least {self.low}, not {number}{self.advice}"
        return f"must be at most {self.high}, not {number}" if number > self.high else None


# The fields of SamplingParams that hold one number, except `seed`, for which any is valid.
NUMBER_RULES: Mapping[str, FloatRule | IntegerRule] = {
    "temperature": FloatRule(0, 100),
    "top_p": FloatRule(0, 1),
    "min_p": FloatRule(0, 1),
    "presence_penalty": FloatRule(-2, 2),
    "frequency_penalty": FloatRule(-2, 2),
    "repetition_penalty": FloatRule(0, 10, above_low=True),
    "top_k": IntegerRule(1, advice="; leave it out to keep all tokens"),
    "max_gen_len": IntegerRule(0),
    "min_gen_len": IntegerRule(0),
}
_LOGIT_BIAS = FloatRule(-100, 100)


def as_float32(value: object) -> float | None:
    """`value` rounded to 32 bits; None if it is not a number."""
    if isinstance(value, str | bytes):  # float() would read it
        return None
    try:
        return ctypes.c_float(float(cast("SupportsFloat", value))).value
    except OverflowError:  # an integer of more than 1,000 bits
        return math.inf if cast("int", value) > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        return None


def as_integer(value: object) -> int | None:
    """`value` as an integer; None if it is not one, and 5.0 is not."""
    try:
        return operator.index(value)  # type: ignore[arg-type]  # what it refuses is None
    except TypeError:
        return None


def number_violations(values: Mapping[str, object], path: str = "") -> list[Violation]:
    """The violations of NUMBER_RULES by `values`, which are given by field name."""
    return [
        Violation(path + name, problem)
        for name, rule in NUMBER_RULES.items()
        if name in values and (problem := rule.problem(values[name]))
    ]


def sampling_violations(
    sampling: SamplingParams, vocab_size: int, path: str = "sampling."
) -> list[Violation]:
    """All violations by the present fields of `sampling`; `path` prefixes their names."""
    # The type of HasField lists the field names as literals.
    present = {
        name: getattr(sampling, name)
        for name in NUMBER_RULES
        if sampling.HasField(name)  # type: ignore[arg-type]
    }
    return [
        *number_violations(present, path),
        *_min_gen_len_violations(sampling, path),
        *_stop_violations(sampling.stop, f"{path}stop"),
        *_token_ids_violations(
            sampling.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size, f"{path}stop_token_ids"
        ),
        *_logit_bias_violations(sampling.logit_bias, vocab_size, f"{path}logit_bias"),
    ]


def top_logprobs_violations(top_logprobs: int, path: str = "top_logprobs") -> list[Violation]:
    """The violation of the rule for the number of alternatives per token."""
    if 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
        return []
    return [Violation(path, f"must be 0 to {MAX_TOP_LOGPROBS}, not {top_logprobs}")]


def logprob_token_ids_violations(
    token_ids: Sequence[int], vocab_size: int, path: str = "logprob_token_ids"
) -> list[Violation]:
    """The rules for the tokens that are scored whatever their rank."""
    return _token_ids_violations(token_ids, MAX_LOGPROB_TOKEN_IDS, vocab_size, path)


def count_violations(path: str, count: int, limit: int) -> list[Violation]:
    """The violation of the rule for a list of 1 to `limit` entries."""
    if count == 0:
        return [Violation(path, "must not be empty")]
    if count > limit:
        return [Violation(path, f"must hold at most {limit} entries, not {count}")]
    return []


def token_id_problem(token_id: int, vocab_size: int) -> str | None:
    """The rule that a token id breaks, or None."""
    if token_id < 0:
        return f"must be at least 0, not {token_id}"
    if token_id >= vocab_size:
        return f"must be less than the vocabulary size, {vocab_size}, not {token_id}"
    return None


def token_id_violations(token_ids: Sequence[int], vocab_size: int, path: str) -> list[Violation]:
    """The first invalid id only, because a hostile list could have millions."""
    wrong = (index for index, each in enumerate(token_ids) if not 0 <= each < vocab_size)
    return [
        Violation(f"{path}[{index}]", problem)
        for index in itertools.islice(wrong, 1)
        if (problem := token_id_problem(token_ids[index], vocab_size))
    ]


def prompt_violations(
    ids: Sequence[int], vocab_size: int, context_length: int, path: str
) -> list[Violation]:
    """The violations of the rules for a prompt's token ids; `path` is the prompt's own."""
    if not ids:
        return [Violation(path, "must not be empty")]
    if len(ids) > context_length:
        return [Violation(path, too_long(len(ids), context_length))]
    return token_id_violations(ids, vocab_size, path)


def too_long(tokens: int | str, context_length: int) -> str:
    """The text for a prompt with more tokens than the context length."""
    return f"the prompt has {tokens} tokens, the context length is {context_length}"


def _stop_violations(stop: Sequence[str], path: str) -> list[Violation]:
    if len(stop) > MAX_STOP_STRINGS:
        return count_violations(path, len(stop), MAX_STOP_STRINGS)
    rule = f"must have 1 to {MAX_STOP_CHARACTERS} characters"
    return [
        Violation(f"{path}[{index}]", f"{rule}, not {len(text)}")
        for index, text in enumerate(stop)
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS
    ]


def _min_gen_len_violations(sampling: SamplingParams, path: str) -> list[Violation]:
    most = sampling.max_gen_len if sampling.HasField("max_gen_len") else MAX_UINT32
    if sampling.min_gen_len <= most:
        return []
    rule = f"must be at most max_gen_len, {most}, not {sampling.min_gen_len}"
    return [Violation(f"{path}min_gen_len", rule)]


def _token_ids_violations(
    token_ids: Sequence[int], limit: int, vocab_size: int, path: str
) -> list[Violation]:
    if len(token_ids) > limit:
        return count_violations(path, len(token_ids), limit)
    return [
        Violation(f"{path}[{index}]", problem)
        for index, token_id in enumerate(token_ids)
        if (problem := token_id_problem(token_id, vocab_size))
    ]


def _logit_bias_violations(
    logit_bias: Mapping[int, float], vocab_size: int, path: str
) -> list[Violation]:
    if len(logit_bias) > MAX_LOGIT_BIASES:
        return count_violations(path, len(logit_bias), MAX_LOGIT_BIASES)
    return [
        Violation(f"{path}[{token_id}]", problem)
        for token_id, bias in sorted(logit_bias.items())
        if (problem := token_id_problem(token_id, vocab_size) or _LOGIT_BIAS.problem(bias))
    ]
