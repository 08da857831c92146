"""A day's shape in miniature: how long answers take as the load approaches what the card can do.

Capacity is what a closed loop gets out of the services with as many requests at a time as the
engine runs. Then requests arrive as a Poisson process at shares of it, as `chasqui bench --rate`
sends them: latencies count from when a request was meant to be sent.
"""

import asyncio
from collections.abc import Iterator

from bench.gpu.sizes import Sizes
from bench.report import Row, Value
from chasqui.loadtest import lengths
from chasqui.loadtest.generator import Closed, Open, Until
from chasqui.loadtest.measurement import Measurement, Plan, measure
from chasqui.loadtest.summary import Distribution
from chasqui.loadtest.workload import Workload
from client.results import Model
from client.sync import Client

SHARES = (0.5, 0.8, 0.95)
PERCENTILES = (50, 95, 99)
CONNECTIONS = 4  # each takes its share of the streams


def day(address: str, at_once: int, sizes: Sizes) -> Iterator[Row]:
    """Throughput and latencies at capacity, `at_once` requests at a time, and at each of SHARES."""
    with Client(address) as client:
        model = client.get_model()
    full = _measured(address, model, Closed(at_once), sizes)
    yield _row("capacity", None, full)
    for share in SHARES:
        rate = share * full.summary.requests_per_second
        yield _row(f"{share:.0%}", rate, _measured(address, model, Open(rate, 0), sizes))


def _measured(address: str, model: Model, loop: Closed | Open, sizes: Sizes) -> Measurement:
    """RuntimeError: nothing was answered."""
    plan = Plan(
        target=address,
        loop=loop,
        until=Until(seconds=sizes.day_seconds),
        warmup=0,
        workload=Workload(
            lengths.parse(sizes.day_prompts),
            lengths.parse(sizes.day_answers),
            shared_prefix=0,
            dialogs=(),
            sampling={"temperature": 0.0},
            seed=0,
        ),
        timeout=None,
        connections=CONNECTIONS,
    )
    found = asyncio.run(measure(plan, model))
    if found is None or not found.summary.succeeded:
        raise RuntimeError(f"no request was answered at a load of {loop}")
    return found


def _row(load: str, rate: float | None, measurement: Measurement) -> Row:
    summary = measurement.summary
    return Row(
        "day",
        {"load": load, "requests_per_s": rate},
        {
            "answered_per_s": summary.requests_per_second,
            "tokens_per_s": summary.output_tokens_per_second,
            "failed": summary.failed,
            **_latencies("first_token", summary.time_to_first_token),
            **_latencies("between_tokens", summary.inter_token_latency),
            **_latencies("answer", summary.end_to_end_latency),
            "client_share_of_core": measurement.run.cpu_share,
        },
    )


def _latencies(name: str, found: Distribution | None) -> dict[str, Value]:
    return {
        f"{name}_ms_p{percent}": None if found is None else 1e3 * found.percentile(percent)
        for percent in PERCENTILES
    }
