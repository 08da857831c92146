"""Engines that differ in one setting, loaded side by side and asked in turn, round after round.

So their ratios are from the same minutes. A variant that this device or this build cannot load is a
note with its reason, and costs the others nothing.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

from bench.engine.driver import QUANTIZED, Driver, Job, Trial, loaded
from bench.engine.roofline import Rates
from bench.engine.throughput import Load
from bench.report import Row, ratio, spread

BLOCK_SIZES = (16, 32, 64)  # tokens; the first is the default


def formats(job: Job) -> dict[str, Job]:
    """The wide type, the quantized formats, and an 8-bit cache."""
    cache = replace(job, settings={**job.settings, "kv_cache_dtype": "fp8"})
    quantized = {each: replace(job, precision=each) for each in QUANTIZED}
    return {job.dtype: job, **quantized, "fp8 cache": cache}


def block_sizes(job: Job) -> dict[str, Job]:
    """The sizes that the blocks of the KV cache may have."""
    return {
        str(size): replace(job, settings={**job.settings, "block_size": size})
        for size in BLOCK_SIZES
    }


def side_by_side(
    case: str,
    variants: Mapping[str, Job],
    load: Load,
    *,
    long_prompt: int,
    rounds: int,
    rates: Rates,
    add_note: Callable[[str], None],
) -> Iterator[Row]:
    """Decode of `load`, and the wait for the first token of a long prompt; ratios to the first."""
    with ExitStack() as stack:
        drivers: dict[str, Driver] = {}
        for name, job in variants.items():
            length = max(load.prompt + load.answer, long_prompt + 1)
            room = max(load.streams * (load.prompt + load.answer), length)
            try:
                opened = loaded(job.sized(load.streams, length, room))
                drivers[name] = stack.enter_context(opened)
            except Exception as error:  # the others are measured, whatever it is
                if not drivers:
                    raise
                add_note(f"{case}: {name}: {type(error).__name__}: {error}")
        trials: dict[str, list[Trial]] = {name: [] for name in drivers}
        waits: dict[str, list[float]] = {name: [] for name in drivers}
        for number in range(rounds + 1):  # the first pays for what later ones find ready
            for name, driver in drivers.items():
                trial = driver.answer(driver.prompts([load.prompt] * load.streams), load.answer)
                wait = driver.answer(driver.prompts([long_prompt]), 1)
                if number:
                    trials[name].append(trial)
                    waits[name].append(1e3 * sum(wait.seconds()))
        decode = {name: [trial.decode_rate() for trial in each] for name, each in trials.items()}
        first = next(iter(drivers))
        for name in drivers:
            read = [trial.decode_bandwidth(variants[name].network) for trial in trials[name]]
            yield Row(
                case,
                {"variant": name, "streams": load.streams},
                {
                    **spread("tokens_per_s", decode[name]),
                    f"over_{first}": ratio(decode[name], decode[first]),
                    "share_of_copy_bandwidth": statistics.median(read) / rates.copy,
                    "prefill_ms": statistics.median(waits[name]),
                    f"prefill_over_{first}": ratio(waits[first], waits[name]),
                },
            )
