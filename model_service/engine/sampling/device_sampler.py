"""Sampling on the device: launched behind a step's forward, read later.

The choices are those of `HostSampler`, from the same uniform numbers: these depend on seed and
position alone, so they are uploaded before the token in front of them is known. The host decides
what depends on parameters (which rows are greedy, which need their vocabulary sorted), and nothing
that depends on logits.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from model_service.engine.pending_token import pending_token, resolve_pending
from model_service.engine.sampling.columns import (
    DrawColumns,
    PenaltyColumns,
    draw_columns,
    penalty_columns,
    temperature_column,
)
from model_service.engine.sampling.device_penalties import PenaltyTables
from model_service.engine.sampling.device_truncation import draw, draw_truncated
from model_service.engine.sampling.host_truncation import in_highest_blocks
from model_service.engine.sampling.result import StepResult
from model_service.engine.sequence import SamplingParams, Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow
from model_service.model.pinned_transfer import Download, upload

_LARGEST = torch.finfo(torch.float32).max
_ROWS_SCORED_AT_ONCE = 256  # a whole prompt's logprobs would double the memory of its logits


@dataclass(frozen=True, slots=True)
class _Scored:
    """The rows whose logprobs are wanted."""

    rows: list[int]
    targets: list[int]  # [rows], the tokens to score; pending ones are what the step samples
    alternatives: int  # the most that a row wants


@dataclass(frozen=True, slots=True)
class DeviceSampling:
    """A step's sampling under way."""

    sampled: torch.Tensor  # [num_sampled] int64, on the device
    rows: list[LogitRow]
    sampled_rows: list[int]
    scored_rows: list[int]
    download: Download

    def read(self) -> StepResult:
        """Waits for the device, and returns the step's result."""
        sampled, finite, logprobs, top_ids, top_logprobs = (
            tensor.tolist() for tensor in self.download.wait()
        )
        failed: dict[Sequence, int] = {}
        for row, is_finite in zip(self.rows, finite, strict=True):
            if not is_finite:
                failed.setdefault(row.sequence, row.position)
        tokens = [
            (i, token)
            for i, token in zip(self.sampled_rows, sampled, strict=True)
            if self.rows[i].sequence not in failed
        ]
        scores = {}
        entries = zip(self.scored_rows, logprobs, top_ids, top_logprobs, strict=True)
        for i, own, ids, values in entries:
            count = self.rows[i].sequence.request.top_logprobs
            scores[i] = TokenLogprobs(own, tuple(zip(ids[:count], values[:count], strict=True)))
        return StepResult.of(self.rows, tokens, scores, failed)


class DeviceSampler:
    """Launches the sampling of steps, one after the other; their rows have no drafts."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        with torch.inference_mode():
            self._penalties = PenaltyTables(vocab, device)

    def forget(self, sequence: Sequence) -> None:
        self._penalties.forget(sequence)

    @torch.inference_mode()
    def launch(self, rows: list[LogitRow], logits: torch.Tensor) -> DeviceSampling:
        sampled_rows = [i for i, row in enumerate(rows) if not row.in_prompt]
        sampled = self._sample(self._select(logits, sampled_rows), [rows[i] for i in sampled_rows])
        scored = _scored(rows)
        scores = self._score(self._select(logits, scored.rows), scored, sampled)
        # A NaN is both extremes of its row; to look at each logit would take several copies of all.
        extremes = torch.stack((logits.amin(dim=-1), logits.amax(dim=-1)))
        finite = torch.isfinite(extremes).all(dim=0)
        download = Download((sampled, finite, *scores))
        return DeviceSampling(sampled, rows, sampled_rows, scored.rows, download)

    def _select(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if len(rows) in (0, len(logits)):
            return logits[: len(rows)]
        (indices,) = upload(self._device, np.array(rows, dtype=np.int64))
        return logits[indices]

    def _sample(self, logits: torch.Tensor, rows: list[LogitRow]) -> torch.Tensor:
        """One token per row [rows]; any token where the row is not finite."""
        params = [row.sequence.request.sampling for row in rows]
        penalized = [i for i, each in enumerate(params) if each.has_penalties]
        if not penalized:
            return self._choose(logits, rows, params)
        columns = penalty_columns([params[i] for i in penalized])
        indices, slots, *uploaded = upload(
            self._device,
            np.array(penalized, dtype=np.int64),
            np.array([self._penalties.slot(rows[i].sequence) for i in penalized], dtype=np.int64),
            *(getattr(columns, field.name) for field in fields(columns)),
        )
        changed = self._penalties.apply(logits[indices], slots, PenaltyColumns(*uploaded))
        tokens = self._choose(logits.index_copy(0, indices, changed), rows, params)
        self._penalties.record(slots, tokens[indices])
        return tokens

    def _choose(
        self, logits: torch.Tensor, rows: list[LogitRow], params: list[SamplingParams]
    ) -> torch.Tensor:
        """`_sample` from logits that have their penalties."""
        random = [i for i, each in enumerate(params) if not each.greedy]
        if not random:
            return logits.argmax(dim=-1)
        truncated = [i for i in random if _truncates(params[i])]
        order = truncated + [i for i in random if not _truncates(params[i])]
        ordered = [params[i] for i in order]
        columns = draw_columns(ordered, [rows[i].position for i in order], self._vocab)
        indices, temperature, *uploaded = upload(
            self._device,
            np.array(order, dtype=np.int64),
            temperature_column(ordered),
            *(getattr(columns, field.name) for field in fields(columns)),
        )
        on_device = DrawColumns(*uploaded)
        in_order = order == [*range(len(rows))]
        scaled = (logits if in_order else logits[indices]) / temperature
        probabilities = torch.softmax(scaled.clamp_(-_LARGEST, _LARGEST), dim=-1)
        count = len(truncated)
        parts = []
        if count:
            parts.append(draw_truncated(probabilities[:count], on_device.rows(slice(count))))
        if count < len(order):
            parts.append(draw(probabilities[count:], on_device.uniform[count:]))
        tokens = torch.cat(parts)
        return tokens if in_order else logits.argmax(dim=-1).index_copy_(0, indices, tokens)

    def _score(
        self, logits: torch.Tensor, scored: _Scored, sampled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `host_sampler.score`: the targets' logprobs [rows], ids and logprobs of the best ones.

        Args:
            logits: [rows, vocab], as the network gave them.
            scored: what is wanted of the rows.
            sampled: [num_sampled], what pending targets stand for.
        """
        if not scored.rows:  # the usual case
            return logits[:, 0], logits[:, :0].long(), logits[:, :0]
        most = min(scored.alternatives, self._vocab)
        chosen, top_ids, top_values = [], [], []
        (targets,) = upload(self._device, np.array(scored.targets, dtype=np.int64))
        if min(scored.targets) < 0:
            targets = resolve_pending(targets, sampled)
        parts = (torch.split(tensor, _ROWS_SCORED_AT_ONCE) for tensor in (logits, targets))
        for part, wanted in zip(*parts, strict=True):
            logprobs = torch.log_softmax(part, dim=-1)
            chosen.append(logprobs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
            values, ids = _highest(logprobs, most)
            top_values.append(values)
            top_ids.append(ids)
        return torch.cat(chosen), torch.cat(top_ids), torch.cat(top_values)


def _scored(rows: list[LogitRow]) -> _Scored:
    wanted: list[int] = []
    targets: list[int] = []
    alternatives = num_sampled = 0
    for i, row in enumerate(rows):
        sequence = row.sequence
        if row.in_prompt or sequence.request.logprobs:
            wanted.append(i)
            own = sequence.tokens[row.position] if row.in_prompt else pending_token(num_sampled)
            targets.append(own)
            alternatives = max(alternatives, sequence.request.top_logprobs)
        num_sampled += not row.in_prompt
    return _Scored(wanted, targets, alternatives)


def _highest(logprobs: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row, descending, and their ids [rows, count]."""
    if not count:
        return logprobs[:, :0], logprobs[:, :0].long()
    candidates, ids, _ = in_highest_blocks(logprobs, count)
    values, order = candidates.topk(count, dim=-1)
    return values, ids.gather(-1, order)


def _truncates(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.min_p > 0 or bool(params.top_k)
