"""Other formats of weights and cache, and larger shapes.

The formats of one shape are loaded side by side and asked in turn, round after round, so that their
ratios are from the same minutes. One that this device or this build cannot load is noted, with the
reason, and costs the others nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from bench.engine.driver import Driver, Job, Passage, loaded
from bench.engine.roofline import Card, Network
from bench.engine.session import Setting
from bench.gpu.cases import batch, decode_rates, decode_values, first_token_seconds, one_stream
from bench.gpu.sizes import Sizes
from bench.report import Row
from bench.summary import ratio, summarize

LARGE_BATCH = 16
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are held."""

    name: str
    precision: str  # of the weights
    kv_bytes: int  # of one number in the cache
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(slots=True)
class _Measured:
    """What one format's engine did, round by round."""

    format: Format
    driver: Driver
    passages: list[Passage] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)  # seconds


def formats(job: Job, card: Card, sizes: Sizes, note: Note) -> Iterator[Row]:
    """Single streams and long prompts with weights of 8 and 4 bits, over the wide type."""
    length = max(sizes.short_prompt + sizes.answer, sizes.long_prompt + 2)
    single = replace(job, sequences=1, length=length, tokens=length)
    wide = 4 if job.dtype == "float32" else 2
    others = [
        *(Format(precision, precision, wide) for precision in ("int8", "int4", "fp8")),
        Format(f"{job.dtype}, fp8 cache", job.dtype, 1, {"kv_cache_dtype": "fp8"}),
    ]
    with ExitStack() as stack:
        measured = [
            _Measured(Format(job.dtype, job.dtype, wide), stack.enter_context(loaded(single)))
        ]
        for each in others:
            settings = {**job.settings, **each.settings}
            opening = loaded(replace(single, precision=each.precision, settings=settings))
            try:
                measured.append(_Measured(each, stack.enter_context(opening)))
            except Exception as error:  # whatever it is, the other formats are measured
                note(f"formats: {each.name}: {type(error).__name__}: {error}")
        _in_turn(measured, sizes)
        yield from _rows(measured, job, card)


def _in_turn(all_measured: Sequence[_Measured], sizes: Sizes) -> None:
    for _ in range(sizes.rounds):
        for each in all_measured:
            (prompt,) = each.driver.prompts([sizes.short_prompt])
            each.passages.append(each.driver.answer([prompt], sizes.answer))
            each.prompts += first_token_seconds(each.driver, sizes.long_prompt, 1)


def _rows(all_measured: Sequence[_Measured], job: Job, card: Card) -> Iterator[Row]:
    wide = all_measured[0]
    for each in all_measured:
        network = Network(job.shape, each.format.precision, each.format.kv_bytes)
        yield Row(
            "formats",
            {"shape": job.shape.name, "format": each.format.name},
            {
                **decode_values(each.passages, network, card),
                "over_wide": ratio(decode_rates(each.passages), decode_rates(wide.passages)),
                "prefill_ms": 1e3 * summarize(each.prompts).median,
                "prefill_over_wide": ratio(wide.prompts, each.prompts),
            },
        )


def larger(job: Job, card: Card, sizes: Sizes) -> Iterator[Row]:
    """A shape that is loaded alone: single streams, and a small batch."""
    few = replace(sizes, streams=LARGE_BATCH)
    tokens = few.streams * (few.prompt + few.answer)
    length = max(few.prompt, few.short_prompt) + few.answer
    network = Network(job.shape, job.precision or job.dtype)
    with loaded(replace(job, sequences=few.streams, length=length, tokens=tokens)) as driver:
        yield from one_stream(driver, network, card, few)
        yield from batch(driver, network, card, few)
