"""The result of a step by sequence: tokens, logprobs, and failures.

`HostSampling` reads it from the logits and checks drafts. `DeviceSampling` makes the same without
drafts, and without the host seeing a logit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from model_service.engine.sequence import Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow


class SampledToken(NamedTuple):  # one per sequence and step: a dataclass is slower to create
    """A token that extends an answer, or one of the stop ids, which ends it."""

    id: int
    logprobs: TokenLogprobs | None  # if the request wants them


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step."""

    tokens: dict[Sequence, list[SampledToken]]
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]  # where they are wanted; in order
    # Sequences with a logit that is not finite, and the position of the token that it was for.
    failed: dict[Sequence, int]

    @classmethod
    def of(
        cls,
        rows: list[LogitRow],
        tokens: Iterable[tuple[int, int]],
        logprobs: Mapping[int, TokenLogprobs],
        failed: dict[Sequence, int],
    ) -> "StepResult":
        """The result by sequence.

        Args:
            rows: of the step's logits.
            tokens: pairs of a row's index and the token that it made, in order.
            logprobs: by a row's index; in order.
            failed: sequences that cannot go on.
        """
        result = cls({}, {}, failed)
        for i, token in tokens:
            made = result.tokens.setdefault(rows[i].sequence, [])
            made.append(SampledToken(token, logprobs.get(i)))
        for i, entry in logprobs.items():
            if rows[i].in_prompt:
                result.prompt_logprobs.setdefault(rows[i].sequence, []).append(entry)
        return result
