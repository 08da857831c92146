"""The step loop's body: schedules a step, runs it, and books its results into the sequences.

With lookahead a step is launched before the last one's tokens are known on the host: sequences then
end in pending tokens, which the device fills in by itself. The consequences of a token (a sequence
stops, a block becomes known by its content) are booked when it is read, one step late. Results for
a sequence that has ended by then are dropped.

Not thread-safe: the caller of `step` owns the engine. That is `EngineThread` in the service, and
`llama.Llama` in a Python process.
"""

import itertools
import time
from collections.abc import Hashable
from dataclasses import dataclass

from model_service.engine.drafting.draft_cache import DraftCache
from model_service.engine.drafting.model_drafter import ModelDrafter
from model_service.engine.drafting.ngram_drafter import NgramDrafter
from model_service.engine.kv_cache.block_pool import BlockPool
from model_service.engine.limits import EngineLimits, EngineLoad
from model_service.engine.pending_token import pending_token
from model_service.engine.sampling.device.sampler import DeviceSampler, DeviceSampling
from model_service.engine.sampling.host.step_sampling import HostSampling
from model_service.engine.sampling.outputs import final_output, prompt_output, step_output
from model_service.engine.sampling.result import SampledToken, StepResult
from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.schedule import Chunk, Schedule
from model_service.engine.scheduling.scheduler import Scheduler
from model_service.engine.scheduling.speculation.speculation import Speculation
from model_service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    Sequence,
    SequenceOutput,
    Status,
)
from model_service.engine.step.batch import LogitRow, plan_step
from model_service.engine.step.runner import ModelRunner
from model_service.engine.step.step_timer import StepTimer
from model_service.engine.step.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step that was launched and is still to be read."""

    schedule: Schedule
    ends: list[Chunk]  # those that reach the end of their sequence
    sampling: HostSampling | DeviceSampling
    timer: StepTimer
    planned: float  # by time.monotonic
    computed: float | None  # None: on the device, only the result tells


class Engine:
    """Continuous batching over one replica's runner."""

    def __init__(
        self, runner: ModelRunner, limits: EngineLimits, draft_runner: ModelRunner | None = None
    ) -> None:
        """Starts without sequences; a draft model's cache has as many blocks as the target's."""
        self.limits = limits
        self.step_times = StepTimes()
        self._runner = runner
        self._sampler = DeviceSampler(limits.vocab_size, runner.device)  # only with lookahead
        self._pool = BlockPool(limits.blocks, limits.block_size)
        self._prefill_budget = PrefillBudget(
            limits.max_stall, limits.block_size, limits.max_step_tokens, runner.recorded_tokens
        )
        drafts = 0 if limits.lookahead else limits.draft_tokens  # they follow a known token
        drafter = None
        if draft_runner is not None:
            cache = DraftCache(limits.blocks, limits.block_size, prefix_cache=limits.prefix_cache)
            drafter = ModelDrafter(draft_runner, cache)
        self._speculation = Speculation(NgramDrafter(), self._prefill_budget, drafts, drafter)
        self._scheduler = Scheduler(
            self._pool,
            self._prefill_budget,
            self._speculation,
            max_batch_size=limits.max_batch_size,
            max_step_tokens=limits.max_step_tokens,
            prefix_cache=limits.prefix_cache,
        )
        self._sequences: dict[Hashable, Sequence] = {}
        self._arrivals = itertools.count()
        self._ready: list[SequenceOutput] = []  # outputs that need no step
        self._in_flight: InFlightStep | None = None  # only with lookahead
        self._read_at = 0.0  # when the last step's result was there
        self._steps = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._ready or self._in_flight)

    def add(self, request: GenerationRequest) -> None:
        """Accepts a request; its outputs come from `step`.

        Raises:
            ValueError: the request breaks a limit of the engine; the message says which.
        """
        self.limits.check(request)
        if request.request_id in self._sequences:
            raise ValueError(f"request_id {request.request_id!r} is running already")
        sequence = Sequence.from_request(request, self.limits.context_length, next(self._arrivals))
        if sequence.needs_no_step:
            prompt = prompt_output(sequence) if request.prompt_logprobs else ((), ())
            self._ready.append(final_output(sequence, sequence.length_reason, *prompt))
            return
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: Hashable) -> None:
        """Ends a sequence and frees its blocks at once; an unknown id is ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)
            self._ready.append(final_output(sequence, FinishReason.CANCELLED))

    def step(self) -> list[SequenceOutput]:
        """Runs one step. Returns an output for each sequence that it advanced or ended.

        With lookahead, these are the outputs of the step before, while the new one runs.
        """
        outputs, self._ready = self._ready, []
        step, self._in_flight = self._in_flight, None
        if step is not None and self._scheduler.must_preempt:
            # Sequences that end in the step in flight may free enough blocks, and a preempted one
            # must have all of its tokens on the host.
            outputs += self._collect(step)
            step = None
        if self.limits.lookahead:
            self._in_flight = self._launch()
        else:
            step = self._launch()
        if step is not None:
            outputs += self._collect(step)
        return outputs

    def probe(self) -> None:
        """Sends one token through all shards; raises what a step would raise."""
        self._runner.probe()

    def load(self) -> EngineLoad:
        return EngineLoad(
            running_sequences=self._scheduler.running_count,
            waiting_sequences=self._scheduler.waiting_count,
            total_blocks=self._pool.total,
            free_blocks=self._pool.free_count,
            cached_blocks=self._pool.cached_count,
            outstanding_tokens=self._scheduler.outstanding_tokens,
            steps=self._steps,
            preemptions=self._scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._scheduler.cached_prompt_tokens,
            completion_tokens=self._completion_tokens,
            drafts=dict(self._speculation.counts),
        )

    def _launch(self) -> InFlightStep | None:
        """Schedules a step and starts it; None if there is nothing to do."""
        timer = StepTimer(self._runner.device)
        schedule = self._scheduler.schedule()
        if not schedule.chunks:
            return None
        for chunk in schedule.chunks[schedule.decode_rows :]:
            if chunk.sequence.first_step_at is None:
                chunk.sequence.first_step_at = timer.started
        plan, rows = plan_step(schedule, lookahead=self.limits.lookahead)
        ends = [chunk for chunk in schedule.chunks if chunk.end == len(chunk.sequence.tokens)]
        planned = time.monotonic()
        logits = self._runner.execute(plan)
        self._steps += 1
        if not self.limits.lookahead:
            timer.end()
            sampling = HostSampling(rows, logits, self._runner.scan)
            return InFlightStep(schedule, ends, sampling, timer, planned, time.monotonic())
        launched = self._sampler.launch(rows, logits)
        if plan.num_sampled:
            self._runner.feed(launched.sampled)
        timer.end()
        self._reserve_pending(schedule, rows, ends)
        return InFlightStep(schedule, ends, launched, timer, planned, computed=None)

    @staticmethod
    def _reserve_pending(schedule: Schedule, rows: list[LogitRow], ends: list[Chunk]) -> None:
        """Lets the sequences of the step in flight go on, behind tokens that are pending."""
        for chunk in schedule.chunks:
            chunk.sequence.num_computed = chunk.end
        sampling = [row.sequence for row in rows if not row.in_prompt]
        for index, sequence in enumerate(sampling):
            sequence.tokens.append(pending_token(index))
        for chunk in ends:
            if not chunk.sequence.generates:
                chunk.sequence.status = Status.LAST_STEP

    def _collect(self, step: InFlightStep) -> list[SequenceOutput]:
        """Waits for a step's results, and books them into the sequences that have not ended."""
        result = step.sampling.read()
        now = time.monotonic()
        running = [chunk for chunk in step.schedule.chunks if chunk.sequence.is_running]
        self._book_compute(step, running, now)
        for sequence, scores in result.prompt_logprobs.items():
            sequence.prompt_scores += scores
        ends = [chunk for chunk in step.ends if chunk.sequence.is_running]
        for chunk in ends:
            self._extend(chunk, result.tokens.get(chunk.sequence, []))
        failed = [sequence for sequence in result.failed if sequence.is_running]
        self._scheduler.advance(c for c in running if c.sequence not in result.failed)
        outputs = [
            *(self._fail(sequence, result.failed[sequence]) for sequence in failed),
            *(self._output(c, result, now) for c in ends if c.sequence not in result.failed),
        ]
        computed = step.computed or now
        self.step_times.observe(
            len(step.schedule.chunks),
            draft=step.schedule.draft_seconds,
            schedule=step.planned - step.timer.started - step.schedule.draft_seconds,
            forward=computed - max(step.planned, self._read_at),
            sample=time.monotonic() - computed,
        )
        self._read_at = now
        return outputs

    def _book_compute(self, step: InFlightStep, running: list[Chunk], now: float) -> None:
        """Splits the step's time over its tokens, and counts those of prompts."""
        schedule = step.schedule
        seconds = step.timer.seconds(self._read_at, now)
        rows, drafted, draft = schedule.decode_rows, schedule.drafted_tokens, schedule.draft_seconds
        extra = schedule.prompt_tokens + drafted
        if drafted and not schedule.prompt_tokens:
            self._speculation.checked(rows, drafted, seconds - draft)
        else:
            launch = step.timer.launch_seconds - draft
            self._prefill_budget.record(rows, extra, seconds - draft, launch)
        per_token = seconds / (rows + extra)
        for chunk in running:
            chunk.sequence.compute += per_token * chunk.length
            if chunk.begin < (prompt := len(chunk.sequence.request.prompt_ids)):
                self._prompt_tokens += min(chunk.end, prompt) - chunk.begin

    def _extend(self, chunk: Chunk, made: list[SampledToken]) -> None:
        """Adds a step's tokens to their sequence; accepted drafts are in the cache already."""
        sequence = chunk.sequence
        ids = [token.id for token in made]
        self._speculation.learn(sequence, chunk.drafts, ids)
        if not ids:
            return
        kept = ids[:-1] if ids[-1] in sequence.request.stop_ids else ids
        # With lookahead a pending token stands there, and perhaps the next one behind it.
        sequence.tokens[chunk.end : chunk.end + self.limits.lookahead] = kept
        self._completion_tokens += len(kept)
        chunk.end += len(ids) - 1

    def _output(self, chunk: Chunk, result: StepResult, now: float) -> SequenceOutput:
        """The output for a sequence that the step computed to its end."""
        sequence = chunk.sequence
        output = step_output(sequence, chunk.end, result.tokens.get(sequence, []), now)
        if output.finish_reason is not None:
            self._end(sequence)
        return output

    def _fail(self, sequence: Sequence, position: int) -> SequenceOutput:
        self._scheduler.invalidate(sequence)
        self._end(sequence)
        return final_output(
            sequence,
            FinishReason.FAILED,
            error="the network gave a logit that is not finite for the token at position "
            f"{position}: the weights may be damaged, or overflow in this dtype",
        )

    def _end(self, sequence: Sequence) -> None:
        """Frees all that is held for a sequence; steps launched later may use its blocks."""
        del self._sequences[sequence.request.request_id]
        self._scheduler.remove(sequence)
        self._sampler.forget(sequence)
