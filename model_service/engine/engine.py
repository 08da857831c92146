"""The step loop's body: commands in, one step, outputs out.

Not thread-safe: whoever calls `step` owns the engine. `EngineThread` is that owner in the service,
`llama.Llama` in a Python process.
"""

import itertools
import time
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from model_service.engine.block_pool import BlockPool
from model_service.engine.plan import StepPlan
from model_service.engine.runner import ModelRunner
from model_service.engine.sampler import SamplingRow, finite_rows, sample, score
from model_service.engine.scheduler import Chunk, Scheduler
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
    free_blocks: int
    outstanding_tokens: int  # prompt and answer tokens that may still be computed
    steps: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a step's logits: predicts the token at `position` of its sequence."""

    sequence: Sequence
    position: int


class Engine:
    """Continuous batching over one replica's runner."""

    def __init__(self, runner: ModelRunner, limits: EngineLimits) -> None:
        self.limits = limits
        self._runner = runner
        self._pool = BlockPool(limits.blocks, limits.block_size)
        self._scheduler = Scheduler(self._pool, limits.max_batch_size, limits.max_step_tokens)
        self._sequences: dict[Hashable, Sequence] = {}
        self._arrivals = itertools.count()
        self._ready: list[SequenceOutput] = []  # outputs that need no step
        self._steps = 0

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
        chunks = self._scheduler.schedule()
        if not chunks:
            return outputs
        for chunk in chunks:
            if chunk.sequence.first_step_at is None:
                chunk.sequence.first_step_at = started
        plan, rows = _plan(chunks)
        logits = self._runner.execute(plan)
        self._steps += 1
        return outputs + self._advance(chunks, rows, logits, started)

    def probe(self) -> None:
        """Sends one token through all shards; raises what a step would raise."""
        self._runner.probe()

    def load(self) -> EngineLoad:
        sequences = self._sequences.values()
        return EngineLoad(
            running=self._scheduler.running_count,
            waiting=self._scheduler.waiting_count,
            total_blocks=self._pool.total,
            free_blocks=self._pool.free_count,
            outstanding_tokens=sum(s.limit - s.num_computed for s in sequences),
            steps=self._steps,
            preemptions=self._scheduler.preemptions,
        )

    def _advance(
        self, chunks: list[Chunk], rows: list[_Row], logits: torch.Tensor, started: float
    ) -> list[SequenceOutput]:
        """Books a step's results into its sequences."""
        finite = finite_rows(logits)
        broken = {row.sequence for row, ok in zip(rows, finite, strict=True) if not ok}
        good = [i for i, row in enumerate(rows) if row.sequence not in broken]
        rows = [rows[i] for i in good]
        logits = logits if len(good) == len(finite) else logits[good]

        sampled = self._sample(rows, logits)
        scores = self._score(rows, logits, sampled)
        elapsed = (time.monotonic() - started) / sum(chunk.length for chunk in chunks)
        outputs = []
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            sequence.compute += elapsed * chunk.length
            if sequence in broken:
                outputs.append(self._fail(sequence))
            elif (output := self._append(sequence, sampled, scores)) is not None:
                outputs.append(output)
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
    ) -> SequenceOutput | None:
        """Gives a sequence its new token; None when the step only computed a part of its prompt."""
        request = sequence.request
        if sequence.num_uncomputed:
            return None
        ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.prompt_logprobs and sequence.first_token_at is None:
            ids, logprobs = self._prompt_output(sequence)
        if sequence not in sampled:
            return self._finish(sequence, FinishReason.LENGTH, ids, logprobs)
        token = sampled[sequence]
        sequence.last_token_at = time.monotonic()
        sequence.first_token_at = sequence.first_token_at or sequence.last_token_at
        if token in request.stop_ids:
            return self._finish(sequence, FinishReason.STOP, ids, logprobs)
        sequence.tokens.append(token)
        ids += (token,)
        if request.logprobs:
            logprobs += (scores[sequence],)
        if not sequence.generates:
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
        self._remove(sequence)
        return _final(sequence, reason, ids, logprobs)

    def _fail(self, sequence: Sequence) -> SequenceOutput:
        self._remove(sequence)
        return _final(
            sequence,
            FinishReason.FAILED,
            error="the network gave a logit that is not finite for the token at position "
            f"{len(sequence.tokens)}: the weights may be damaged, or overflow in this dtype",
        )

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        self._scheduler.remove(sequence)


def _final(
    sequence: Sequence,
    reason: FinishReason,
    ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    error: str = "",
) -> SequenceOutput:
    request_id = sequence.request.request_id
    return SequenceOutput(request_id, ids, logprobs, reason, sequence.timings(), error)


def _sampling_row(sequence: Sequence) -> SamplingRow:
    request = sequence.request
    answer_start = len(request.prompt_ids) - request.offset
    return SamplingRow(request.sampling, sequence.tokens, answer_start)


def _rows(chunk: Chunk) -> list[_Row]:
    """The positions whose logits a chunk must give: unscored prompt tokens, and the next token."""
    sequence = chunk.sequence
    # Logits at index i predict the token at position i + 1.
    first = max(sequence.num_computed + 1, sequence.unscored)
    last_in_prompt = min(chunk.end + 1, len(sequence.request.prompt_ids))
    rows = [_Row(sequence, position) for position in range(first, last_in_prompt)]
    if chunk.end == len(sequence.tokens) and sequence.generates:
        rows.append(_Row(sequence, chunk.end))
    return rows


def _plan(chunks: list[Chunk]) -> tuple[StepPlan, list[_Row]]:
    """The step's plan, and what each row of its logits is for."""
    spans = []
    rows: list[_Row] = []
    tokens: list[int] = []
    logit_rows: list[int] = []
    for chunk in chunks:
        sequence, begin = chunk.sequence, chunk.sequence.num_computed
        wanted = _rows(chunk)
        rows += wanted
        logit_rows += (len(tokens) + row.position - 1 - begin for row in wanted)
        tokens += sequence.tokens[begin : chunk.end]
        spans.append(SequenceSpan(chunk.length, chunk.end, tuple(sequence.block_table)))
    plan = StepPlan(
        tuple(spans), np.array(tokens, dtype=np.int32), np.array(logit_rows, dtype=np.int32)
    )
    return plan, rows
