"""What the model service tells Prometheus beyond its calls: the load report that the engine's
thread publishes after each step, and its step times. A scrape costs the engine nothing.
"""

import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from model_service.engine.thread import EngineThread
from model_service.loading.load_replica import ModelInfo
from serving.telemetry.metrics import histogram_family

# Name behind "chasqui_model_", meaning; the field of EngineLoad has the name unless it is given.
_GAUGES = {
    "running_sequences": ("running_sequences", "Sequences that hold blocks."),
    "waiting_sequences": ("waiting_sequences", "Sequences that wait for a place."),
    "blocks": ("total_blocks", "Blocks of the KV cache."),
    "free_blocks": ("free_blocks", "Blocks that no sequence holds, cached ones included."),
    "cached_blocks": (
        "cached_blocks",
        "Blocks that no sequence holds, but that serve prompts which begin alike.",
    ),
    "outstanding_tokens": (
        "outstanding_tokens",
        "Prompt and answer tokens that may still be computed.",
    ),
}
_COUNTERS = {
    "steps": "Forward passes.",
    "preemptions": "Sequences moved back to the queue because blocks ran out.",
    "prompt_tokens": "Prompt tokens computed, again after a preemption included.",
    "cached_prompt_tokens": "Prompt tokens found in the prefix cache, and so not computed.",
    "completion_tokens": "Answer tokens made.",
    "drafted_tokens": "Tokens that speculation proposed.",
    "accepted_tokens": "Of these, tokens that sampling then drew.",
}


class EngineMetrics:
    """The engine's load report in Prometheus's terms."""

    def __init__(self, engine: EngineThread, info: ModelInfo) -> None:
        self._engine = engine
        self._info = {
            "model": info.name,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "shards": str(info.shards),
            "device": info.device,
            "fingerprint": info.fingerprint,
        }

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load
        yield InfoMetricFamily("chasqui_model", "What was loaded.", value=self._info)
        yield GaugeMetricFamily(
            "chasqui_model_last_step_age_seconds",
            "Since a token last went through all shards; an idle engine sends one every 5 seconds.",
            value=time.monotonic() - self._engine.last_step_at,
        )
        for name, (source, documentation) in _GAUGES.items():
            value = getattr(load, source)
            yield GaugeMetricFamily(f"chasqui_model_{name}", documentation, value=value)
        for name, documentation in _COUNTERS.items():
            value = getattr(load, name)
            yield CounterMetricFamily(f"chasqui_model_{name}", documentation, value=value)
        yield from self._steps()

    def _steps(self) -> Iterable[Metric]:
        times = self._engine.step_times
        seconds = histogram_family(
            "chasqui_model_step_seconds",
            "Time of a step's parts. On CUDA, sample includes what is left of the forward; with "
            "lookahead, forward is the time between two steps' tokens, which includes the others.",
            [((part,), histogram.snapshot()) for part, histogram in times.parts.items()],
            "part",
        )
        rows = histogram_family(
            "chasqui_model_step_sequences",
            "Sequences that a step serves.",
            [((), times.rows.snapshot())],
        )
        return seconds, rows
