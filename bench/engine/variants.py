"""Engines that differ in one setting, loaded side by side and asked in turn, round after round.

So their ratios are from the same minutes. A variant that this device or this build cannot load is a
note with its reason, and costs the others nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from bench.engine.driver import QUANTIZED, Driver, Job, Load, loaded
from bench.engine.roofline import Rates
from bench.report import Row, ratio, spread

BLOCK_SIZES = (16, 32, 64)  # tokens; the first is the default


def formats(job: Job) -> dict[str, Job]:
    """The wide type, the quantized formats, and an 8-bit cache."""
    quantized = {each: replace(job, precision=each) for each in QUANTIZED}
    return {job.dtype: job, **quantized, "fp8 cache": job.with_settings(kv_cache_dtype="fp8")}


def invariance(job: Job) -> dict[str, Job]:
    """The default kernels, and those whose results depend on no other request."""
    return {"default": job, "batch_invariant": job.with_settings(batch_invariant=True)}


def block_sizes(job: Job) -> dict[str, Job]:
    """The sizes that the blocks of the KV cache may have."""
    return {str(size): job.with_settings(block_size=size) for size in BLOCK_SIZES}


def side_by_side(
    case: str,
    variants: Mapping[str, Job],
    loads: Sequence[Load],
    *,
    long_prompt: int,
    rounds: int,
    rates: Rates,
    add_note: Callable[[str], None],
) -> Iterator[Row]:
    """Decode of each load, and the wait for the first token of a long prompt; ratios to the first
    variant.
    """
    length = max(long_prompt + 1, *(load.prompt + load.answer for load in loads))
    room = max(length, *(load.streams * (load.prompt + load.answer) for load in loads))
    streams = max(load.streams for load in loads)
    with ExitStack() as stack:
        drivers: dict[str, Driver] = {}
        for name, job in variants.items():
            try:
                opened = loaded(job.sized(streams, length, room))
                drivers[name] = stack.enter_context(opened)
            except Exception as error:  # the others are measured, whatever it is
                if not drivers:
                    raise
                add_note(f"{case}: {name}: {type(error).__name__}: {error}")
        for load in loads:
            yield from _asked_in_turn(
                case, variants, drivers, load, long_prompt=long_prompt, rounds=rounds, rates=rates
            )


def _asked_in_turn(
    case: str,
    variants: Mapping[str, Job],
    drivers: Mapping[str, Driver],
    load: Load,
    *,
    long_prompt: int,
    rounds: int,
    rates: Rates,
) -> Iterator[Row]:
    """Rows of one load, its variants asked one after the other in each round."""
    decode: dict[str, list[float]] = defaultdict(list)
    read: dict[str, list[float]] = defaultdict(list)
    waits: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):  # the first pays for what later ones find ready
        for name, driver in drivers.items():
            trial = driver.answer_load(load)
            wait = driver.answer_load(Load(1, long_prompt, 1))
            if number:
                decode[name].append(trial.decode_rate())
                read[name].append(trial.decode_bandwidth(variants[name].network))
                waits[name].append(1e3 * sum(wait.seconds()))
    first = next(iter(drivers))
    for name in drivers:
        yield Row(
            case,
            {"variant": name, "streams": load.streams},
            {
                **spread("tokens_per_s", decode[name]),
                f"over_{first}": ratio(decode[name], decode[first]),
                "share_of_copy_bandwidth": median(read[name]) / rates.copy,
                "prefill_ms": median(waits[name]),
                f"prefill_over_{first}": ratio(waits[first], waits[name]),
            },
        )
