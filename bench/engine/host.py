"""The host's time to launch a step, and how prompts get on beside streams that decode."""

import statistics
from collections.abc import Iterator

from bench.engine.driver import Load
from bench.engine.throughput import Loaded
from bench.report import Row


def host(loaded: Loaded, load: Load) -> Iterator[Row]:
    """Two thirds of the streams decode when the prompts of the others arrive at once.

    A step of single tokens is a recorded graph on CUDA, one with prompt tokens is not.
    """
    driver = loaded.driver
    decoding = max(1, load.streams * 2 // 3)
    driver.fill(driver.prompts([load.prompt] * decoding), [load.answer] * decoding)
    driver.step()  # the first without prompts
    for prompt in driver.prompts([load.prompt] * (load.streams - decoding)):
        driver.add(prompt, max(1, load.answer // 4))
    count = load.answer // 4
    for _ in range(count):
        driver.step()
    # With lookahead, a call launches a step and returns the one that was launched by the last call.
    ahead = driver.engine.limits.lookahead
    steps, seconds = driver.trial.steps, driver.trial.seconds()
    measured = range(len(steps) - count, len(steps))
    driver.clear()
    for with_prompts in (False, True):
        kind = [i for i in measured if bool(steps[i].prompt_tokens) == with_prompts]
        if not kind:
            continue
        launches = [1e3 * steps[i - ahead].forward for i in kind]
        yield Row(
            "host",
            {"weights": loaded.job.weights, "streams": decoding, "prompt_tokens": with_prompts},
            {
                "launch_ms": statistics.median(launches),
                "launch_ms_high": max(launches),
                "step_ms": 1e3 * statistics.median(seconds[i] for i in kind),
                "step_ms_high": 1e3 * max(seconds[i] for i in kind),
                "prompt_tokens_per_step": statistics.median(steps[i].prompt_tokens for i in kind),
                "prompt_tokens_low": min(steps[i].prompt_tokens for i in kind),
                "steps": len(kind),
            },
        )
