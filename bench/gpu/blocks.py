"""Which size the blocks of the KV cache should have: engines that differ in nothing else are loaded
side by side and asked in turn, round after round.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from bench.engine.driver import Job, Passage, loaded
from bench.gpu.cases import decode_rates
from bench.gpu.sizes import Sizes
from bench.report import Row
from bench.summary import ratio, summarize

BLOCK_SIZES = (16, 32, 64)  # tokens; the first is the default


def block_sizes(job: Job, sizes: Sizes) -> Iterator[Row]:
    """Many streams at once, from their prompts to their last tokens, for each size."""
    length = sizes.prompt + sizes.answer
    crowd = replace(job, sequences=sizes.streams, length=length, tokens=sizes.streams * length)
    passages: dict[int, list[Passage]] = {size: [] for size in BLOCK_SIZES}
    with ExitStack() as stack:
        drivers = {
            size: stack.enter_context(
                loaded(replace(crowd, settings={**job.settings, "block_size": size}))
            )
            for size in BLOCK_SIZES
        }
        for _ in range(sizes.rounds + 1):  # the first pays for what later ones find ready
            for size, driver in drivers.items():
                prompts = driver.prompts([sizes.prompt] * sizes.streams)
                passages[size].append(driver.answer(prompts, sizes.answer))
    decode = {size: decode_rates(each[1:]) for size, each in passages.items()}
    seconds = {size: [sum(p.seconds()) for p in each[1:]] for size, each in passages.items()}
    for size in BLOCK_SIZES:
        yield Row(
            "blocks",
            {"shape": job.shape.name, "streams": sizes.streams, "block_size": size},
            {
                "decode_tokens_per_s": summarize(decode[size]).median,
                "decode_over_default": ratio(decode[size], decode[BLOCK_SIZES[0]]),
                "over_default": ratio(seconds[BLOCK_SIZES[0]], seconds[size]),
            },
        )
