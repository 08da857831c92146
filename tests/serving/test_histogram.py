"""Our histogram counts as Prometheus's own does."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from serving.telemetry import histogram
from serving.telemetry.metrics import histogram_family

BOUNDS = (0.0, 0.5, 1.0, 10.0)


def numbers(metric: Metric) -> dict[tuple[str, str], float]:
    def key(sample: Sample) -> tuple[str, str]:
        bound = sample.labels.get("le", "")
        return sample.name, str(float(bound)) if bound else ""

    samples = (each for each in metric.samples if not each.name.endswith("_created"))
    return {key(sample): sample.value for sample in samples}


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100))))
def test_counts_are_those_of_prometheus_client(values: list[float]) -> None:
    registry = CollectorRegistry()
    theirs = Histogram("h", "h", buckets=BOUNDS, registry=registry)
    ours = histogram.Histogram(BOUNDS)
    for value in values:
        theirs.observe(value)
        ours.observe(value)
    [expected] = registry.collect()
    assert numbers(histogram_family("h", "h", [((), ours.snapshot())])) == numbers(expected)


def test_snapshot_does_not_change() -> None:
    observed = histogram.Histogram(BOUNDS)
    before = observed.snapshot()
    observed.observe(1)
    assert sum(before.counts) == before.sum == 0
