"""Reports of a run: a table to read, and a JSON document for programs.

docs/clients/bench.md documents the document's fields: change both together.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version

import grpc

from chasqui.loadtest.generator import Closed, Open
from chasqui.loadtest.measurement import Measurement, Plan
from chasqui.loadtest.records import Failure, Record, Run, Success
from chasqui.loadtest.summary import PERCENTILES, Distribution, Summary
from client.results import Model

# Fraction of one core above which the generator, a single thread, may notice events too late.
BUSY_CPU_SHARE = 0.7

SHOWN_PERCENTILES = (50, 90, 99)


def headline(plan: Plan, model: Model) -> str:
    """The description of a measurement, known before it begins."""
    return f"{model.name} at {plan.target}, {plan.loop}; {plan.workload}\n"


def table(measurement: Measurement) -> str:
    """The results as text: counts, rates, latencies in ms, and doubts about the measurement."""
    return "\n".join(_lines(measurement))


def document(measurement: Measurement) -> dict[str, object]:
    """All results, ready for `json.dump`."""
    run, summary, model = measurement.run, measurement.summary, measurement.model
    return {
        "chasqui": version("chasqui-llama"),
        "started": run.started.isoformat(timespec="seconds"),
        "target": measurement.plan.target,
        "settings": _settings(measurement.plan),
        "model": asdict(model) | {"determinism": model.determinism.name},
        "client": {
            **_host(),
            "cpu_seconds": run.cpu_seconds,
            "cpu_share": run.cpu_share,
            "cpu_us_per_token": _cpu_us_per_token(measurement),
        },
        "summary": _summary(run, summary),
        "requests": [_record(record) for record in run.records],
    }


def _lines(measurement: Measurement) -> Iterator[str]:
    run, summary = measurement.run, measurement.summary
    cached = summary.cached_prompt_tokens / summary.prompt_tokens if summary.prompt_tokens else 0
    yield f"requests  {summary.succeeded:,} ok, {summary.failed:,} failed in {run.seconds:.1f} s"
    yield f"          {summary.requests_per_second:,.2f} requests/s"
    yield f"output    {summary.output_tokens_per_second:,.1f} tokens/s"
    yield f"prompts   {summary.prompt_tokens_per_second:,.1f} tokens/s, {cached:.0%} from the cache"
    yield ""
    heads = ("mean", *(f"p{percent}" for percent in SHOWN_PERCENTILES), "max")
    yield f"{'ms':22}" + "".join(f"{head:>10}" for head in heads)
    for name, distribution in _latencies(summary).items():
        yield f"{name:22}" + _row(distribution)
    yield from (f"\nnote: {text}" for text in _notes(measurement))


def _row(distribution: Distribution | None) -> str:
    if distribution is None:
        return f"{'–':>10}"
    shown = (
        distribution.mean,
        *(distribution.percentile(percent) for percent in SHOWN_PERCENTILES),
        distribution.max,
    )
    return "".join(f"{1e3 * each:>10,.1f}" for each in shown)


def _notes(measurement: Measurement) -> Iterator[str]:
    run, summary = measurement.run, measurement.summary
    for status, failures in summary.failures.items():
        yield f"{failures.count:,} × {status}, the first: {failures.first_message}"
    if run.interrupted:
        yield f"stopped by a signal; {run.unfinished:,} unfinished requests are not counted"
    if summary.shortened:
        yield (
            f"{summary.shortened:,} requests were shortened to fit the context of "
            f"{measurement.model.context_length:,} tokens"
        )
    if run.cpu_share > BUSY_CPU_SHARE:
        yield (
            f"this client used {run.cpu_share:.0%} of a core, so it may have been the bottleneck: "
            "spread the load over several clients"
        )


def _latencies(summary: Summary) -> dict[str, Distribution | None]:
    return {
        "time to first token": summary.time_to_first_token,
        "inter-token latency": summary.inter_token_latency,
        "time per output token": summary.time_per_output_token,
        "end-to-end latency": summary.end_to_end_latency,
        "queued in the server": summary.queued,
    }


def _settings(plan: Plan) -> dict[str, object]:
    workload = plan.workload
    return {
        "concurrency": plan.loop.concurrency if isinstance(plan.loop, Closed) else None,
        "rate": plan.loop.rate if isinstance(plan.loop, Open) else None,
        "requests": plan.until.requests,
        "duration": plan.until.seconds,
        "warmup": plan.warmup,
        "prompt_tokens": None if workload.dialogs else str(workload.prompt_tokens),
        "answer_tokens": str(workload.answer_tokens),
        "shared_prefix": workload.shared_prefix,
        "dialogs": len(workload.dialogs),
        "seed": workload.seed,
        **workload.sampling,
        "timeout": plan.timeout,
        "connections": plan.connections,
    }


def _summary(run: Run, summary: Summary) -> dict[str, object]:
    return {
        "interrupted": run.interrupted,
        "unfinished": run.unfinished,
        "succeeded": summary.succeeded,
        "failed": summary.failed,
        "failures": {status: asdict(each) for status, each in summary.failures.items()},
        "shortened": summary.shortened,
        "finish_reasons": summary.finish_reasons,
        "seconds": run.seconds,
        "prompt_tokens": summary.prompt_tokens,
        "cached_prompt_tokens": summary.cached_prompt_tokens,
        "output_tokens": summary.output_tokens,
        "tokens_per_event": summary.output_tokens / summary.events if summary.events else None,
        "requests_per_second": summary.requests_per_second,
        "prompt_tokens_per_second": summary.prompt_tokens_per_second,
        "output_tokens_per_second": summary.output_tokens_per_second,
        "time_to_first_token_ms": _distribution(summary.time_to_first_token),
        "inter_token_latency_ms": _distribution(summary.inter_token_latency),
        "time_per_output_token_ms": _distribution(summary.time_per_output_token),
        "end_to_end_latency_ms": _distribution(summary.end_to_end_latency),
        "queued_ms": _distribution(summary.queued),
        "send_delay_ms": _distribution(summary.send_delay),
    }


def _distribution(found: Distribution | None) -> dict[str, float] | None:
    if found is None:
        return None
    percentiles = zip(PERCENTILES, found.percentiles, strict=True)
    return {
        "count": found.count,
        "mean": _ms(found.mean),
        "min": _ms(found.min),
        "max": _ms(found.max),
        **{f"p{percent}": _ms(value) for percent, value in percentiles},
    }


def _record(record: Record) -> dict[str, object]:
    return {
        "index": record.index,
        "intended_ms": _ms(record.intended),
        "sent_ms": _ms(record.sent),
        "arrivals_ms": [_ms(arrival) for arrival in record.arrivals],
        "ended_ms": _ms(record.ended),
        "shortened": record.shortened,
        **_outcome(record.outcome),
    }


def _outcome(outcome: Success | Failure) -> dict[str, object]:
    match outcome:
        case Failure():
            return {
                "status": outcome.status,
                "message": outcome.message,
                "request_id": outcome.request_id,
            }
        case Success(finish_reason, usage):
            return {
                "status": grpc.StatusCode.OK.name,
                "finish_reason": finish_reason.name,
                "prompt_tokens": usage.prompt_tokens,
                "cached_prompt_tokens": usage.cached_prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "queued_ms": _ms(usage.queue_time.total_seconds()),
                "prefill_ms": _ms(usage.prefill_time.total_seconds()),
                "decode_ms": _ms(usage.decode_time.total_seconds()),
                "compute_ms": _ms(usage.compute_time.total_seconds()),
                "total_ms": _ms(usage.total_time.total_seconds()),
            }


def _ms(seconds: float) -> float:
    """Milliseconds, rounded to microseconds: more digits are noise and double the document."""
    return round(1e3 * seconds, 3)


def _host() -> dict[str, object]:
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
    }


def _cpu_us_per_token(measurement: Measurement) -> float | None:
    tokens = measurement.summary.output_tokens
    return 1e6 * measurement.run.cpu_seconds / tokens if tokens else None
