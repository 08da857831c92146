"""The step loop's body: commands in, one step, outputs out.

Not thread-safe: whoever calls `step` owns the engine. `EngineThread` is that owner in the service,
`llama.Llama` in a Python process.
"""

import itertools
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from model_service.engine.block_pool import BlockPool
from model_service.engine.pace import Pace
from model_service.engine.plan import StepPlan
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
from model_service.model.attention import SequenceSpan


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


class _Row(NamedTuple):  # one per sequence and step: a frozen dataclass is slower to create
    """One row of a step's logits: predicts the token at `position` of its sequence."""

    sequence: Sequence
    position: int


class Engine:
    """Continuous batching over one replica's runner."""

    def __init__(self, runner: ModelRunner, limits: EngineLimits) -> None:
        self.limits = limits
        self._runner = runner
        self._pool = BlockPool(limits.blocks, limits.block_size)
        self._pace = Pace(limits.max_stall, limits.block_size, limits.max_step_tokens)
        self._scheduler = Scheduler(
            self._pool,
            self._pace,
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
        plan, rows = _plan(schedule)
        logits = self._runner.execute(plan)
        self._steps += 1
        return outputs + self._advance(schedule, rows, logits, started)

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
        )

    def _advance(
        self, schedule: Schedule, rows: list[_Row], logits: torch.Tensor, started: float
    ) -> list[SequenceOutput]:
        """Books a step's results into its sequences."""
        finite = finite_rows(logits)
        broken = {row.sequence for row, ok in zip(rows, finite, strict=True) if not ok}
        good = [i for i, row in enumerate(rows) if row.sequence not in broken]
        rows = [rows[i] for i in good]
        logits = logits if len(good) == len(finite) else logits[good]

        sampled = self._sample(rows, logits)
        scores = self._score(rows, logits, sampled)
        now = time.monotonic()
        self._pace.record(schedule.decode_rows, schedule.prompt_tokens, now - started)
        per_token = (now - started) / (schedule.decode_rows + schedule.prompt_tokens)
        chunks = schedule.chunks
        if broken:
            chunks = [chunk for chunk in chunks if chunk.sequence not in broken]
        self._scheduler.advance(chunks)
        outputs = []
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            sequence.compute += per_token * (chunk.end - chunk.begin)
            if chunk.begin < (prompt := len(sequence.request.prompt_ids)):
                self._prompt_tokens += min(chunk.end, prompt) - chunk.begin
            if sequence in broken:
                outputs.append(self._fail(sequence))
            elif chunk.end == len(sequence.tokens):
                outputs.append(self._append(sequence, sampled, scores, now))
        return outputs

    def _sample(self, rows: list[_Row], logits: torch.Tensor) -> dict[Sequence, int]:
        """The next token of each sequence whose end the step reached."""
        ends = [
            i
            for i, row in enumerate(rows)
            if row.position == len(row.sequence.tokens) and row.sequence.generates
        ]
        if not ends:
            return {}
        sequences = [rows[i].sequence for i in ends]
        selected = logits if len(ends) == len(rows) else logits[ends]
        chosen = sample(selected, [_sampling_row(sequence) for sequence in sequences])
        return dict(zip(sequences, chosen, strict=True))

    def _score(
        self, rows: list[_Row], logits: torch.Tensor, sampled: dict[Sequence, int]
    ) -> dict[Sequence, TokenLogprobs]:
        """Logprobs of the sampled tokens; those of prompt tokens go into their sequences."""
        wanted: list[int] = []
        targets: list[int] = []
        for i, row in enumerate(rows):
            in_prompt = row.position < len(row.sequence.tokens)
            if in_prompt or (row.sequence.request.logprobs and row.sequence in sampled):
                wanted.append(i)
                targets.append(
                    row.sequence.tokens[row.position] if in_prompt else sampled[row.sequence]
                )
        if not wanted:
            return {}
        selected = logits if len(wanted) == len(rows) else logits[wanted]
        alternatives = [rows[i].sequence.request.top_logprobs for i in wanted]
        result = {}
        for i, entry in zip(wanted, score(selected, targets, alternatives), strict=True):
            sequence = rows[i].sequence
            if rows[i].position < len(sequence.tokens):
                sequence.prompt_scores = sequence.prompt_scores or [UNPREDICTED]
                sequence.prompt_scores.append(entry)
            else:
                result[sequence] = entry
        return result

    def _append(
        self,
        sequence: Sequence,
        sampled: dict[Sequence, int],
        scores: dict[Sequence, TokenLogprobs],
        now: float,
    ) -> SequenceOutput:
        """Gives a sequence, now computed to its end, its new token."""
        request = sequence.request
        ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.prompt_logprobs and sequence.first_token_at is None:
            ids, logprobs = self._prompt_output(sequence)
        if sequence not in sampled:
            return self._finish(sequence, FinishReason.LENGTH, ids, logprobs)
        token = sampled[sequence]
        sequence.last_token_at = now
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if token in request.stop_ids:
            return self._finish(sequence, FinishReason.STOP, ids, logprobs)
        sequence.tokens.append(token)
        self._completion_tokens += 1
        ids += (token,)
        if request.logprobs:
            logprobs += (scores[sequence],)
        if len(sequence.tokens) == sequence.limit:
            return self._finish(sequence, FinishReason.LENGTH, ids, logprobs)
        return SequenceOutput(request.request_id, ids, logprobs)

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


def _sampling_row(sequence: Sequence) -> SamplingRow:
    request = sequence.request
    answer_start = len(request.prompt_ids) - request.offset
    return SamplingRow(request.sampling, sequence.tokens, answer_start)


def _rows(chunk: Chunk) -> list[_Row]:
    """The positions whose logits a chunk must give: unscored prompt tokens, and the next token."""
    sequence = chunk.sequence
    # Logits at index i predict the token at position i + 1.
    first = max(chunk.begin + 1, sequence.unscored)
    last_in_prompt = min(chunk.end + 1, len(sequence.request.prompt_ids))
    rows = [_Row(sequence, position) for position in range(first, last_in_prompt)]
    if chunk.end == len(sequence.tokens) and sequence.generates:
        rows.append(_Row(sequence, chunk.end))
    return rows


def _plan(schedule: Schedule) -> tuple[StepPlan, list[_Row]]:
    """The step's plan, and what each row of its logits is for."""
    # Most chunks are a last token: comprehensions, as there may be hundreds of them in each step.
    decode = schedule.chunks[: schedule.decode_rows]
    spans = [SequenceSpan(1, chunk.end, chunk.sequence.block_table) for chunk in decode]
    tokens = [chunk.sequence.tokens[chunk.begin] for chunk in decode]
    logit_rows = [i for i, chunk in enumerate(decode) if chunk.sequence.limit > chunk.end]
    rows = [_Row(decode[i].sequence, decode[i].end) for i in logit_rows]
    for chunk in schedule.chunks[schedule.decode_rows :]:
        sequence, begin, end = chunk.sequence, chunk.begin, chunk.end
        wanted = _rows(chunk)
        rows += wanted
        logit_rows += [len(tokens) + row.position - 1 - begin for row in wanted]
        tokens += sequence.tokens[begin:end]
        spans.append(SequenceSpan(end - begin, end, sequence.block_table))
    plan = StepPlan(
        tuple(spans), np.array(tokens, dtype=np.int32), np.array(logit_rows, dtype=np.int32)
    )
    return plan, rows
