"""Prefill and decode, in tokens per second and as a share of what the machine could do."""

from collections.abc import Iterable, Iterator

from bench.engine.session import Variant, session
from bench.host import cores
from bench.limits import Limits, measure_limits
from bench.report import Row
from bench.shapes import Shape
from bench.summary import summarize

# Bits per weight that a step has to read. Quantized weights carry scales; these are the least.
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def weight_bytes(shape: Shape, precision: str) -> int:
    """Bytes of all matrices that a step reads."""
    return shape.matmul_parameters * BITS[precision] // 8


def prefill(shape: Shape, variant: Variant, tokens: int, rounds: int) -> Iterator[Row]:
    """One prompt of `tokens`, from `add` to its first token, `rounds` times."""
    with session(variant.options(1, tokens + 1, settings={"max_step_tokens": tokens})) as run:
        seconds, shares = [], []
        for _ in range(rounds + 1):
            limits = _limits(variant)
            seconds.append(run.until_first_token(run.add(run.prompt(tokens), 1)))
            bound = limits.prefill(shape.matmul_parameters, tokens, _gemm_type(variant))
            shares.append(bound / seconds[-1])
    # The first round pays for what later ones find ready: buffers, packed weights, touched pages.
    taken, share = summarize(seconds[1:]), summarize(shares[1:])
    yield Row(
        "prefill",
        {"precision": variant.precision, "tokens": tokens},
        {
            "tokens_per_s": tokens / taken.median,
            "seconds": taken.median,
            "seconds_low": taken.low,
            "seconds_high": taken.high,
            "share_of_gemm_rate": share.median,
        },
    )


def decode(
    shape: Shape,
    variant: Variant,
    batches: Iterable[int],
    *,
    context: int,
    steps: int,
    rounds: int,
) -> Iterator[Row]:
    """`steps` steps of so many streams, each of which begins with `context` tokens."""
    batches = tuple(batches)
    length = context + steps + 2
    at_once = {"max_step_tokens": max(batches) * context}
    with session(variant.options(max(batches), length, settings=at_once)) as run:
        for batch in batches:
            seconds: list[float] = []
            rates: list[float] = []
            reads: list[float] = []
            shares: list[float] = []
            outside: list[float] = []
            for _ in range(rounds):
                limits = _limits(variant)
                run.fill(run.prompts(batch, context), steps + 2)
                timed = [run.step() for _ in range(steps)]
                run.clear()
                total = sum(step.seconds for step in timed)
                seconds += (step.seconds for step in timed)
                rates.append(sum(sum(step.tokens.values()) for step in timed) / total)
                reading = limits.decode_step(weight_bytes(shape, variant.precision))
                computing = limits.prefill(shape.matmul_parameters, batch, _gemm_type(variant))
                reads.append(reading * steps / total)
                shares.append(max(reading, computing) * steps / total)
                outside.append(1 - sum(step.forward for step in timed) / total)
            step, rate = summarize(seconds), summarize(rates)
            yield Row(
                "decode",
                {"precision": variant.precision, "streams": batch, "context": context},
                {
                    "tokens_per_s": rate.median,
                    "tokens_per_s_low": rate.low,
                    "tokens_per_s_high": rate.high,
                    "step_ms": step.median * 1e3,
                    "share_of_read_bandwidth": summarize(reads).median,
                    "share_of_limit": summarize(shares).median,
                    "share_outside_forward": summarize(outside).median,
                },
            )


def context_sweep(
    variant: Variant, contexts: Iterable[int], batch: int, steps: int
) -> Iterator[Row]:
    """Step time of `batch` streams as what they attend to grows."""
    contexts = tuple(contexts)
    at_once = {"max_step_tokens": batch * max(contexts)}
    with session(variant.options(batch, max(contexts) + steps + 2, settings=at_once)) as run:
        for context in contexts:
            run.fill(run.prompts(batch, context), steps + 2)
            step = summarize([run.step().seconds for _ in range(steps)])
            run.clear()
            yield Row(
                "context",
                {"precision": variant.precision, "streams": batch, "context": context},
                {
                    "step_ms": step.median * 1e3,
                    "step_ms_low": step.low * 1e3,
                    "step_ms_high": step.high * 1e3,
                },
            )


def _limits(variant: Variant) -> Limits:
    return measure_limits(bfloat16=variant.dtype == "bfloat16", threads=variant.threads or cores())


def _gemm_type(variant: Variant) -> str:
    """The type in which this variant multiplies large batches."""
    return "int8" if variant.quantize == "int8" else variant.dtype
