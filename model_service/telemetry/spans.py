"""A span for each sequence whose caller sent a traceparent.

All sequences of a gateway share one call, so the call's own span would say nothing about them.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from opentelemetry.trace import Span

from llama.v1 import model_pb2
from model_service.engine.sequence import SequenceOutput
from serving.telemetry import tracing

NAME = "llama.v1.ModelService/Generate"


@dataclass(slots=True)
class _Traced:
    span: Span
    prompt_ids_to_come: int  # reported in front of the answer's
    completion_tokens: int = 0


class SequenceSpans:
    """Spans of the sequences that run. Empty, and free, where nothing is traced."""

    def __init__(self) -> None:
        self._running: dict[Hashable, _Traced] = {}

    def begin(self, key: Hashable, start: model_pb2.StartSequence) -> None:
        prompt = len(start.prompt_ids)
        span = tracing.start(
            NAME,
            start.traceparent,
            {
                "chasqui.sequence": start.sequence_id,
                "gen_ai.usage.input_tokens": prompt - start.generated_tokens,
                "chasqui.offset": start.generated_tokens,
            },
        )
        if span.is_recording():
            reported = prompt - start.scored_from if start.prompt_logprobs else 0
            self._running[key] = _Traced(span, reported)

    def on_output(self, output: SequenceOutput) -> None:
        """Adds the output of a step to its sequence's span; the last one ends the span."""
        traced = self._running.get(output.request_id) if self._running else None
        if traced is None:
            return
        if output.ids:
            made = len(output.ids) - traced.prompt_ids_to_come
            traced.prompt_ids_to_come = 0
            if not traced.completion_tokens and made:
                traced.span.add_event("first token")
            traced.completion_tokens += made
        if output.finish_reason is not None:
            traced.span.set_attributes(
                {
                    "gen_ai.usage.output_tokens": traced.completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": output.cached_prompt_tokens,
                    "gen_ai.response.finish_reasons": [output.finish_reason.name.lower()],
                }
            )
            traced.span.end()
            del self._running[output.request_id]
