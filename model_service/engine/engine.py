"""The step loop's body: commands in, one step, outputs out.

Not thread-safe: whoever calls `step` owns the engine. `EngineThread` is that owner in the service,
`llama.Llama` in a Python process.
"""

import itertools
import time
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from model_service.engine.batch import Row, plan_step
from model_service.engine.block_pool import BlockPool
from model_service.engine.pace import Pace
from model_service.engine.runner import ModelRunner
from model_service.engine.sampler import SamplingRow, finite_rows, sample, score
from model_service.engine.scheduler import Chunk, Schedule, Scheduler
from model_service.engine.sequence import (
    UNPREDICTED,
    FinishReason,
    GenerationRequest,
    Sequence,
    SequenceOutput,
    TokenLogprobs,
)
from model_service.engine.speculation import NgramDrafter, Speculation
from model_service.engine.step_times import StepTimes


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
    draft_tokens: int  # most guesses for a sequence in a step
    lookahead: bool = False  # whether a step is launched before the last one's tokens are read

    def check(self, request: GenerationRequest) -> None:
        """Raises ValueError, naming the rule, when no engine with these limits takes `request`."""
        prompt = request.prompt_ids
        if not prompt:
            raise ValueError("prompt_ids must not be empty")
        if len(prompt) > self.context_length:
            raise ValueError(
                f"prompt_ids has {len(prompt)} tokens, the context length is {self.context_length}"
            )
        outside = [token for token in prompt if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"prompt_ids holds {outside[0]}, the vocabulary has {self.vocab_size} tokens"
            )
        if not 0 <= request.offset < len(prompt):
            raise ValueError("offset must leave at least one token of the prompt")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine is doing now."""

    running: int
    waiting: int
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
class _Drawn:
    """What sampling chose in a step."""

    tokens: dict[Sequence, list[tuple[int, int]]]  # token, and its row of the logits
    failed: set[Sequence]  # a logit that counts was not finite


class Engine:
    """Continuous batching over one replica's runner."""

    def __init__(self, runner: ModelRunner, limits: EngineLimits) -> None:
        self.limits = limits
        self.step_times = StepTimes()
        self._runner = runner
        self._pool = BlockPool(limits.blocks, limits.block_size)
        self._pace = Pace(limits.max_stall, limits.block_size, limits.max_step_tokens)
        self._speculation = Speculation(NgramDrafter(), self._pace, limits.draft_tokens)
        self._scheduler = Scheduler(
            self._pool,
            self._pace,
            self._speculation,
            max_batch_size=limits.max_batch_size,
            max_step_tokens=limits.max_step_tokens,
            prefix_cache=limits.prefix_cache,
        )
        self._sequences: dict[Hashable, Sequence] = {}
        self._arrivals = itertools.count()
        self._ready: list[SequenceOutput] = []  # outputs that need no step
        self._steps = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._ready)

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
            self._scheduler.remove(sequence)
            self._ready.append(_final(sequence, FinishReason.CANCELLED))

    def step(self) -> list[SequenceOutput]:
        """Runs one step. Returns what it made for the sequences that it advanced or ended."""
        started = time.monotonic()
        outputs, self._ready = self._ready, []
        schedule = self._scheduler.schedule()
        if not schedule.chunks:
            return outputs
        for chunk in schedule.chunks[schedule.decode_rows :]:
            if chunk.sequence.first_step_at is None:
                chunk.sequence.first_step_at = started
        plan, rows = plan_step(schedule)
        planned = time.monotonic()
        logits = self._runner.execute(plan)
        computed = time.monotonic()
        self._steps += 1
        outputs += self._advance(schedule, rows, logits, started)
        self.step_times.note(len(schedule.chunks), started, planned, computed, time.monotonic())
        return outputs

    def probe(self) -> None:
        """Sends one token through all shards; raises what a step would raise."""
        self._runner.probe()

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=self._scheduler.running_count,
            waiting=self._scheduler.waiting_count,
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

    def _advance(
        self, schedule: Schedule, rows: list[Row], logits: torch.Tensor, started: float
    ) -> list[SequenceOutput]:
        """Books a step's results into its sequences."""
        drawn = self._draw(rows, logits)
        scores = self._score(rows, logits, drawn)
        now = time.monotonic()
        extra = schedule.prompt_tokens + schedule.drafted_tokens
        self._pace.record(schedule.decode_rows, extra, now - started)
        per_token = (now - started) / (schedule.decode_rows + extra)
        ended = []
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            sequence.compute += per_token * chunk.length
            if chunk.begin < (prompt := len(sequence.request.prompt_ids)):
                self._prompt_tokens += min(chunk.end, prompt) - chunk.begin
            if chunk.end == len(sequence.tokens):
                ended.append(sequence)
                self._extend(chunk, [token for token, _ in drawn.tokens.get(sequence, ())])
        failed = drawn.failed
        self._scheduler.advance(c for c in schedule.chunks if c.sequence not in failed)
        return [
            *(self._fail(sequence) for sequence in failed),
            *(self._output(s, drawn, scores, now) for s in ended if s not in failed),
        ]

    def _draw(self, rows: list[Row], logits: torch.Tensor) -> _Drawn:
        """The next tokens of each sequence whose end the step reached, as far as drafts hold."""
        finite = finite_rows(logits)
        wanted = [
            i
            for i, row in enumerate(rows)
            if finite[i] and row.position >= len(row.sequence.tokens)
        ]
        selected = logits if len(wanted) == len(rows) else logits[wanted]
        chosen = sample(selected, [_sampling_row(rows[i]) for i in wanted]) if wanted else []
        tokens = dict(zip(wanted, chosen, strict=True))
        drawn = _Drawn({}, set())
        complete: set[Sequence] = set()
        for i, row in enumerate(rows):
            sequence = row.sequence
            if sequence in complete:  # what a wrong draft led to
                continue
            if not finite[i]:
                complete.add(sequence)
                # Behind a draft, the next step will see whether it is so without.
                if row.drafts_before <= 0:
                    drawn.failed.add(sequence)
            elif i in tokens:
                drawn.tokens.setdefault(sequence, []).append((tokens[i], i))
                right = row.drafts[row.drafts_before :][:1] == [tokens[i]]
                if not right or tokens[i] in sequence.request.stop_ids:
                    complete.add(sequence)
        return drawn

    def _score(
        self, rows: list[Row], logits: torch.Tensor, drawn: _Drawn
    ) -> dict[int, TokenLogprobs]:
        """Logprobs of drawn tokens, by row; those of prompt tokens go into their sequences."""
        made = {i: token for tokens in drawn.tokens.values() for token, i in tokens}
        in_prompt: list[int] = []
        targets: dict[int, int] = {}
        for i, row in enumerate(rows):
            sequence = row.sequence
            if sequence in drawn.failed:
                continue
            if row.position < len(sequence.tokens):
                in_prompt.append(i)
                targets[i] = sequence.tokens[row.position]
            elif sequence.request.logprobs and i in made:
                targets[i] = made[i]
        if not targets:
            return {}
        selected = logits if len(targets) == len(rows) else logits[[*targets]]
        alternatives = [rows[i].sequence.request.top_logprobs for i in targets]
        entries = score(selected, [*targets.values()], alternatives)
        scores = dict(zip(targets, entries, strict=True))
        for i in in_prompt:
            sequence = rows[i].sequence
            sequence.prompt_scores = sequence.prompt_scores or [UNPREDICTED]
            sequence.prompt_scores.append(scores[i])
        return scores

    def _extend(self, chunk: Chunk, made: list[int]) -> None:
        """Appends what a step made; the drafts among it are in the cache already."""
        sequence = chunk.sequence
        self._speculation.learn(sequence, chunk.drafts, made)
        if not made:
            return
        stopped = made[-1] in sequence.request.stop_ids
        sequence.tokens += made[:-1] if stopped else made
        self._completion_tokens += len(made) - stopped
        chunk.end += len(made) - 1

    def _output(
        self, sequence: Sequence, drawn: _Drawn, scores: dict[int, TokenLogprobs], now: float
    ) -> SequenceOutput:
        """What the step made for a sequence that it computed to its end."""
        request = sequence.request
        ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.prompt_logprobs and sequence.first_token_at is None:
            ids, logprobs = self._prompt_output(sequence)
        made = drawn.tokens.get(sequence, [])
        if not made:
            return self._finish(sequence, FinishReason.LENGTH, ids, logprobs)
        sequence.last_token_at = now
        if first := sequence.first_token_at is None:
            sequence.first_token_at = now
        stopped = made[-1][0] in request.stop_ids
        kept = made[:-1] if stopped else made
        ids += tuple([token for token, _ in kept])
        if request.logprobs:
            logprobs += tuple([scores[i] for _, i in kept])
        if stopped:
            return self._finish(sequence, FinishReason.STOP, ids, logprobs)
        if not sequence.generates:
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
        self._scheduler.remove(sequence)
        return _final(sequence, reason, ids, logprobs)

    def _fail(self, sequence: Sequence) -> SequenceOutput:
        del self._sequences[sequence.request.request_id]
        self._scheduler.discard(sequence)
        return _final(
            sequence,
            FinishReason.FAILED,
            error="the network gave a logit that is not finite for the token at position "
            f"{len(sequence.tokens)}: the weights may be damaged, or overflow in this dtype",
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


def _sampling_row(row: Row) -> SamplingRow:
    sequence, before = row.sequence, row.drafts_before
    request = sequence.request
    tokens = sequence.tokens + row.drafts[:before] if before else sequence.tokens
    return SamplingRow(request.sampling, tokens, len(request.prompt_ids) - request.offset)
