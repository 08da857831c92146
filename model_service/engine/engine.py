"""The step loop's body: commands in, one step, outputs out.

With lookahead a step is launched before the last one's tokens are known here: sequences then end in
tokens that are still to come, which the device puts into the next step by itself. What follows from
tokens (who stops, which blocks are known by their content) is booked when they are read, one step
late; what a step computed for a sequence that had ended by then is dropped.

Not thread-safe: whoever calls `step` owns the engine. `EngineThread` is that owner in the service,
`llama.Llama` in a Python process.
"""

import itertools
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from model_service.engine.kv_cache.block_pool import BlockPool
from model_service.engine.sampling.device_sampler import DeviceSampler
from model_service.engine.sampling.result import StepResult, read_result
from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.scheduler import Chunk, Schedule, Scheduler
from model_service.engine.scheduling.speculation import NgramDrafter, Speculation
from model_service.engine.sequence import (
    UNPREDICTED,
    FinishReason,
    GenerationRequest,
    Sequence,
    SequenceOutput,
    TokenLogprobs,
)
from model_service.engine.step.batch import LogitRow, plan_step
from model_service.engine.step.runner import ModelRunner
from model_service.engine.step.step_times import StepTimes
from serving.request_rules import prompt_violations, token_id_violations


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine may hold at once."""

    context_length: int  # tokens of one sequence
    vocab_size: int
    max_batch_size: int  # sequences that run at once
    max_step_tokens: int  # tokens that one step computes
    blocks: int
    block_size: int  # tokens per block
    prefix_cache: bool  # whether keys and values outlive the sequence that computed them
    max_stall: float  # longest step while sequences decode, in steps without prompt tokens
    draft_tokens: int  # most guesses for a sequence in a step; with lookahead none are made
    lookahead: bool = False  # whether a step is launched before the last one's tokens are read

    def check(self, request: GenerationRequest) -> None:
        """Raises ValueError, naming the rule, when no engine with these limits takes `request`."""
        prompt = request.prompt_ids
        broken = [
            *prompt_violations(prompt, self.vocab_size, self.context_length, "prompt_ids"),
            *token_id_violations(sorted(request.stop_ids), self.vocab_size, "stop_ids"),
        ]
        if broken:
            raise ValueError(f"{broken[0].field}: {broken[0].description}")
        if not 0 <= request.offset < len(prompt):
            raise ValueError("offset must leave at least one token of the prompt")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine is doing now."""

    running_sequences: int
    waiting_sequences: int
    total_blocks: int
    free_blocks: int  # cached ones included
    cached_blocks: int  # that no sequence holds
    outstanding_tokens: int  # prompt and answer tokens that may still be computed
    # Since the start:
    steps: int
    preemptions: int
    prompt_tokens: int  # computed
    cached_prompt_tokens: int  # found in the cache
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int  # of those


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step that was launched."""

    schedule: Schedule
    rows: list[LogitRow]
    ends: list[Chunk]  # those that reach the end of their sequence
    read: Callable[[], StepResult]  # waits for what the step makes
    # By time.monotonic:
    started: float
    planned: float
    computed: float | None  # None: on the device, only the result tells


class Engine:
    """Continuous batching over one replica's runner."""

    def __init__(self, runner: ModelRunner, limits: EngineLimits) -> None:
        self.limits = limits
        self.step_times = StepTimes()
        self._runner = runner
        self._sampler = DeviceSampler(limits.vocab_size, runner.device)
        self._pool = BlockPool(limits.blocks, limits.block_size)
        self._prefill_budget = PrefillBudget(
            limits.max_stall, limits.block_size, limits.max_step_tokens
        )
        drafts = 0 if limits.lookahead else limits.draft_tokens  # they follow a known token
        self._speculation = Speculation(NgramDrafter(), self._prefill_budget, drafts)
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
        """Takes a request; its outputs come from `step`.

        Raises:
            ValueError: the request breaks a limit of the engine; the message says which.
        """
        self.limits.check(request)
        if request.request_id in self._sequences:
            raise ValueError(f"request_id {request.request_id!r} is running already")
        sequence = Sequence.from_request(request, self.limits.context_length, next(self._arrivals))
        if sequence.needs_no_step:
            prompt = self._prompt_output(sequence) if request.prompt_logprobs else ((), ())
            self._ready.append(_final(sequence, FinishReason.LENGTH, *prompt))
            return
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: Hashable) -> None:
        """Ends a sequence and frees its blocks at once; an unknown id is ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._forget(sequence)
            self._ready.append(_final(sequence, FinishReason.CANCELLED))

    def step(self) -> list[SequenceOutput]:
        """Runs one step. Returns what it made for the sequences that it advanced or ended.

        With lookahead that is what the step before made, while the new one runs.
        """
        outputs, self._ready = self._ready, []
        flight, self._in_flight = self._in_flight, None
        if flight is not None and self._scheduler.must_preempt:
            # Who ends with it may free enough blocks; who gives way needs all tokens known.
            outputs += self._collect(flight)
            flight = None
        if self.limits.lookahead:
            self._in_flight = self._launch()
        else:
            flight = self._launch()
        if flight is not None:
            outputs += self._collect(flight)
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
            drafted_tokens=self._speculation.drafted,
            accepted_tokens=self._speculation.accepted,
        )

    def _launch(self) -> InFlightStep | None:
        """Schedules a step and sets it going; None when there is nothing to do."""
        started = time.monotonic()
        schedule = self._scheduler.schedule()
        if not schedule.chunks:
            return None
        for chunk in schedule.chunks[schedule.decode_rows :]:
            if chunk.sequence.first_step_at is None:
                chunk.sequence.first_step_at = started
        plan, rows = plan_step(schedule, lookahead=self.limits.lookahead)
        ends = [chunk for chunk in schedule.chunks if chunk.end == len(chunk.sequence.tokens)]
        planned = time.monotonic()
        logits = self._runner.execute(plan)
        self._steps += 1
        if not self.limits.lookahead:
            read = partial(read_result, rows, logits)
            return InFlightStep(schedule, rows, ends, read, started, planned, time.monotonic())
        launched = self._sampler.launch(rows, logits)
        if plan.num_sampled:
            self._runner.feed(launched.drawn)
        self._reserve_pending(schedule, rows, ends)
        return InFlightStep(schedule, rows, ends, launched.read, started, planned, computed=None)

    @staticmethod
    def _reserve_pending(schedule: Schedule, rows: list[LogitRow], ends: list[Chunk]) -> None:
        """Lets the sequences of a step under way go on, behind tokens that are still to come."""
        for chunk in schedule.chunks:
            chunk.sequence.num_computed = chunk.end
        drawing = [row.sequence for row in rows if not row.in_prompt]
        for index, sequence in enumerate(drawing):
            sequence.tokens.append(~index)
        for chunk in ends:
            chunk.sequence.all_launched = not chunk.sequence.generates

    def _collect(self, flight: InFlightStep) -> list[SequenceOutput]:
        """Waits for what a step makes, and books it into the sequences that are still there."""
        result = flight.read()
        now = time.monotonic()
        schedule, last = flight.schedule, self._read_at
        seconds = now - max(flight.started, last)
        extra = schedule.prompt_tokens + schedule.drafted_tokens
        self._prefill_budget.record(schedule.decode_rows, extra, seconds)
        per_token = seconds / (schedule.decode_rows + extra)
        alive = [c for c in schedule.chunks if self._scheduler.is_running(c.sequence)]
        for chunk in alive:
            sequence = chunk.sequence
            sequence.compute += per_token * chunk.length
            if chunk.begin < (prompt := len(sequence.request.prompt_ids)):
                self._prompt_tokens += min(chunk.end, prompt) - chunk.begin
        self._record_prompt_scores(flight.rows, result)
        ends = [chunk for chunk in flight.ends if self._scheduler.is_running(chunk.sequence)]
        for chunk in ends:
            self._extend(chunk, [token for token, _ in result.tokens.get(chunk.sequence, ())])
        failed = [sequence for sequence in result.failed if self._scheduler.is_running(sequence)]
        self._scheduler.advance(c for c in alive if c.sequence not in result.failed)
        outputs = [
            *(self._fail(sequence, result.failed[sequence]) for sequence in failed),
            *(self._output(c, result, now) for c in ends if c.sequence not in result.failed),
        ]
        self._read_at = now
        computed = flight.computed or now
        self.step_times.note(
            len(schedule.chunks),
            schedule=flight.planned - flight.started,
            forward=computed - max(flight.planned, last),
            sample=time.monotonic() - computed,
        )
        return outputs

    @staticmethod
    def _record_prompt_scores(rows: list[LogitRow], result: StepResult) -> None:
        for i, entry in result.scores.items():
            if rows[i].in_prompt:
                sequence = rows[i].sequence
                sequence.prompt_scores = sequence.prompt_scores or [UNPREDICTED]
                sequence.prompt_scores.append(entry)

    def _extend(self, chunk: Chunk, made: list[int]) -> None:
        """Enters what a step made; the drafts among it are in the cache already."""
        sequence = chunk.sequence
        self._speculation.learn(sequence, chunk.drafts, made)
        if not made:
            return
        stopped = made[-1] in sequence.request.stop_ids
        kept = made[:-1] if stopped else made
        # With lookahead a place is held for the one token, and perhaps for the next behind it.
        sequence.tokens[chunk.end : chunk.end + self.limits.lookahead] = kept
        self._completion_tokens += len(kept)
        chunk.end += len(made) - 1

    def _output(self, chunk: Chunk, result: StepResult, now: float) -> SequenceOutput:
        """What the step made for a sequence that it computed to its end."""
        sequence, request = chunk.sequence, chunk.sequence.request
        ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.prompt_logprobs and sequence.first_token_at is None:
            ids, logprobs = self._prompt_output(sequence)
        made = result.tokens.get(sequence, [])
        if not made:
            return self._finish(sequence, FinishReason.LENGTH, ids, logprobs)
        sequence.last_token_at = now
        if first := sequence.first_token_at is None:
            sequence.first_token_at = now
        stopped = made[-1][0] in request.stop_ids
        kept = made[:-1] if stopped else made
        ids += tuple([token for token, _ in kept])
        if request.logprobs:
            logprobs += tuple([result.scores[i] for _, i in kept])
        if stopped:
            return self._finish(sequence, FinishReason.STOP, ids, logprobs)
        if chunk.end + 1 == sequence.limit:
            return self._finish(sequence, FinishReason.LENGTH, ids, logprobs)
        cached = sequence.cached_prompt_tokens if first else 0
        return SequenceOutput(request.request_id, ids, logprobs, cached_prompt_tokens=cached)

    def _prompt_output(
        self, sequence: Sequence
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        scores = tuple(sequence.prompt_scores) or (UNPREDICTED,)
        return sequence.request.prompt_ids, scores

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
    ) -> SequenceOutput:
        del self._sequences[sequence.request.request_id]
        self._forget(sequence)
        return _final(sequence, reason, ids, logprobs)

    def _forget(self, sequence: Sequence) -> None:
        """Gives up all that is held for a sequence; steps launched later may use its blocks."""
        self._scheduler.remove(sequence)
        self._sampler.forget(sequence)

    def _fail(self, sequence: Sequence, position: int) -> SequenceOutput:
        del self._sequences[sequence.request.request_id]
        self._scheduler.invalidate(sequence)
        self._forget(sequence)
        return _final(
            sequence,
            FinishReason.FAILED,
            error="the network gave a logit that is not finite for the token at position "
            f"{position}: the weights may be damaged, or overflow in this dtype",
        )


def _final(
    sequence: Sequence,
    reason: FinishReason,
    ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    error: str = "",
) -> SequenceOutput:
    return SequenceOutput(
        sequence.request.request_id,
        ids,
        logprobs,
        reason,
        error=error,
        timings=sequence.timings(),
        cached_prompt_tokens=sequence.cached_prompt_tokens,
    )
