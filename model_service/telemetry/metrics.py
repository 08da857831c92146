"""The model service's metrics beside those of its calls: the engine's load report, which its thread
publishes after each step, and its step times. A scrape costs the engine nothing.
"""

import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from model_service.engine.thread import EngineThread
from model_service.loading.replica import ModelInfo

# By the fields of EngineLoad. A metric is called chasqui_model_ and the field, without "total_".
_GAUGES = {
    "running_sequences": "Sequences that hold blocks.",
    "waiting_sequences": "Sequences that wait for blocks.",
    "total_blocks": "Blocks of the KV cache.",
    "free_blocks": "Blocks that no sequence holds, cached ones included.",
    "cached_blocks": "Blocks that no sequence holds, but that serve prompts which begin alike.",
    "outstanding_tokens": "Prompt and answer tokens that may still be computed.",
}
_COUNTERS = {
    "steps": "Forward passes.",
    "preemptions": "Sequences moved back to the queue because blocks ran out.",
    "prompt_tokens": "Prompt tokens computed, again after a preemption included.",
    "cached_prompt_tokens": "Prompt tokens found in the prefix cache, and so not computed.",
    "completion_tokens": "Answer tokens made.",
}
# By the fields of DraftCount, with the source as a label.
_DRAFTS = {
    "drafted": "Tokens that speculation proposed, by n-grams of the text or by the draft model.",
    "accepted": "Of these, tokens that sampling then drew.",
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
        for field, documentation in _GAUGES.items():
            name = f"chasqui_model_{field.removeprefix('total_')}"
            yield GaugeMetricFamily(name, documentation, value=getattr(load, field))
        for field, documentation in _COUNTERS.items():
            name = f"chasqui_model_{field}"
            yield CounterMetricFamily(name, documentation, value=getattr(load, field))
        for field, documentation in _DRAFTS.items():
            counter = CounterMetricFamily(
                f"chasqui_model_{field}_tokens", documentation, labels=["source"]
            )
            for source, count in load.drafts.items():
                counter.add_metric([source], getattr(count, field))
            yield counter
        yield from self._engine.step_times.collect()
