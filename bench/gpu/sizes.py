"""How much each case measures: enough for a GPU to be busy, or just enough to run every line."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths in tokens, unless they say otherwise."""

    rounds: int  # repetitions of each measurement
    streams: int  # of a batch
    short_prompt: int  # of a single stream
    prompt: int
    answer: int
    long_prompt: int  # of the prefill case
    step_tokens: int  # most tokens of one step
    crowd: int  # sequences of mixed lengths
    crowd_prompts: tuple[int, int]  # shortest and longest
    crowd_steps: int  # that are measured
    traced_steps: int  # that are profiled
    day_seconds: float  # of each load
    day_prompts: str  # distribution of lengths, as `chasqui bench --prompt_tokens` spells it
    day_answers: str

    @property
    def length(self) -> int:
        """Of the longest sequence."""
        crowd = self.crowd_prompts[1] + self.crowd_answer
        traced = self.prompt + self.answer + 4 * self.traced_steps
        return max(self.long_prompt + 2, traced, crowd)

    @property
    def crowd_answer(self) -> int:
        """Long enough that no sequence of the crowd ends while it is measured."""
        # The first of them decode already while the last one's prompt is computed.
        return 5 * (self.crowd_steps + self.traced_steps)

    @property
    def tokens(self) -> int:
        """Of all sequences at once."""
        mean = (sum(self.crowd_prompts) + self.crowd_answer) // 2
        traced = self.prompt + self.answer + 4 * self.traced_steps
        return max(self.streams * traced, self.crowd * mean, self.length)


FULL = Sizes(
    rounds=3,
    streams=64,
    short_prompt=128,
    prompt=512,
    answer=256,
    long_prompt=2048,
    step_tokens=2048,
    crowd=256,
    crowd_prompts=(32, 288),
    crowd_steps=64,
    traced_steps=16,
    day_seconds=15.0,
    day_prompts="lognormal:200,0.6",
    day_answers="lognormal:100,0.6",
)
SMALL = Sizes(
    rounds=1,
    streams=3,
    short_prompt=8,
    prompt=16,
    answer=12,
    long_prompt=32,
    step_tokens=64,
    crowd=5,
    crowd_prompts=(4, 20),
    crowd_steps=4,
    traced_steps=3,
    day_seconds=0.5,
    day_prompts="uniform:4-16",
    day_answers="8",
)
