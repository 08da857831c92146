"""The result of a step by sequence: tokens, logprobs, and failures.

`HostSampler` reads it from the logits and checks drafts. `DeviceSampler` makes the same without
drafts, and without the host seeing a logit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

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


class Sampling(Protocol):
    """A step's sampling under way."""

    def read(self) -> StepResult:
        """Waits for the step's result."""


class Sampler(Protocol):
    """Samples tokens from a step's logits."""

    def launch(self, rows: list[LogitRow], logits: torch.Tensor) -> Sampling:
        """Begins to sample.

        Args:
            rows: what each row of logits is for.
            logits: [len(rows), vocab] float32; a row that is not finite makes its sequence fail.
        """

    def forget(self, sequence: Sequence) -> None:
        """Drops what is held for a sequence that has ended."""
