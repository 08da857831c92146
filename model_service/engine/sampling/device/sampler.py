"""Sampling on the device: launched behind a step's forward, read later.

The choices are those of `HostSampling`, from the same uniform numbers: these depend on seed and
position alone, so they are uploaded before the token in front of them is known. The host decides
what depends on parameters (which rows are greedy, which need their vocabulary sorted), and nothing
that depends on logits.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.engine.pending_token import pending_token, resolve_pending
from model_service.engine.sampling.columns import (
    DrawColumns,
    PenaltyColumns,
    draw_columns,
    penalty_columns,
    temperature_column,
)
from model_service.engine.sampling.device.penalties import PenaltyTables
from model_service.engine.sampling.device.truncation import draw, draw_truncated
from model_service.engine.sampling.host.logprobs import ranks
from model_service.engine.sampling.host.truncation import in_highest_blocks
from model_service.engine.sampling.result import StepResult
from model_service.engine.sequence import SamplingParams, Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow
from model_service.model.cuda.pinned_transfer import Download, upload

_LARGEST = torch.finfo(torch.float32).max
_ROWS_SCORED_AT_ONCE = 256  # a whole prompt's logprobs would double the memory of its logits


@dataclass(frozen=True, slots=True)
class _Scored:
    """The rows whose logprobs are wanted."""

    rows: list[int]
    targets: list[int]  # [rows], the tokens to score; pending ones are what the step samples
    alternatives: int  # the most that a row wants
    requested: NDArray[np.int64]  # [rows, most], token ids that rows want; filled up with 0


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
        sampled, finite, *scored = (tensor.tolist() for tensor in self.download.wait())
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
        for i, own, rank, ids, values, others in zip(self.scored_rows, *scored, strict=True):
            request = self.rows[i].sequence.request
            top = zip(ids[: request.top_logprobs], values, strict=False)
            requested = others[: len(request.logprob_token_ids)]
            scores[i] = TokenLogprobs(own, rank, tuple(top), tuple(requested))
        return StepResult.of(self.rows, tokens, scores, failed)


class DeviceSampler:
    """Launches the sampling of steps, one after the other; their rows have no drafts."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        with torch.inference_mode():
            self._penalties = PenaltyTables(vocab, device)

    def forget(self, sequence: Sequence) -> None:
        """Drops all that is held for a sequence that has ended."""
        self._penalties.forget(sequence)

    @torch.inference_mode()
    def launch(self, rows: list[LogitRow], logits: torch.Tensor) -> DeviceSampling:
        """Begins to sample.

        Args:
            rows: of sequences without drafts.
            logits: [len(rows), vocab] float32; a row that is not finite makes its sequence fail.
        """
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
            return self._choose(self._mask_stops(logits, rows), rows, params)
        columns = penalty_columns([params[i] for i in penalized])
        indices, slots, *uploaded = upload(
            self._device,
            np.array(penalized, dtype=np.int64),
            np.array([self._penalties.slot(rows[i].sequence) for i in penalized], dtype=np.int64),
            *(getattr(columns, field.name) for field in fields(columns)),
        )
        changed = self._penalties.apply(logits[indices], slots, PenaltyColumns(*uploaded))
        changed = self._mask_stops(logits.index_copy(0, indices, changed), rows)
        tokens = self._choose(changed, rows, params)
        self._penalties.record(slots, tokens[indices])
        return tokens

    def _mask_stops(self, logits: torch.Tensor, rows: list[LogitRow]) -> torch.Tensor:
        """The logits without the stop ids of answers that are too short to end."""
        indices = [
            i * self._vocab + stop
            for i, row in enumerate(rows)
            if row.sequence.request.masks_stops_at(row.position)
            for stop in row.sequence.request.stop_ids
        ]
        if not indices:
            return logits
        (masked,) = upload(self._device, np.array(indices, dtype=np.int64))
        return logits.reshape(-1).index_fill(0, masked, -torch.inf).view(logits.shape)

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
    ) -> tuple[torch.Tensor, ...]:
        """As `host_logprobs.score`, one tensor for each field, [rows] or [rows, most].

        They are the targets' logprobs and ranks, ids and logprobs of the most probable tokens, and
        the logprobs of those requested.

        Args:
            logits: [rows, vocab], as the network gave them.
            scored: what is wanted of the rows.
            sampled: [num_sampled], what pending targets stand for.
        """
        if not scored.rows:  # the usual case
            nothing = logits[:, :0]
            return logits[:, 0], logits[:, 0].long(), nothing.long(), nothing, nothing
        most = min(scored.alternatives, self._vocab)
        targets, requested = upload(
            self._device, np.array(scored.targets, dtype=np.int64), scored.requested
        )
        if min(scored.targets) < 0:
            targets = resolve_pending(targets, sampled)
        entries = []
        parts = (torch.split(each, _ROWS_SCORED_AT_ONCE) for each in (logits, targets, requested))
        for part, wanted, others in zip(*parts, strict=True):
            logprobs = torch.log_softmax(part, dim=-1)
            own = logprobs.gather(-1, wanted.unsqueeze(-1))
            values, ids = _highest(logprobs, most)
            others_values = logprobs.gather(-1, others)
            entries.append((own.squeeze(-1), ranks(logprobs, own), ids, values, others_values))
        return tuple(torch.cat(each) for each in zip(*entries, strict=True))


def _scored(rows: list[LogitRow]) -> _Scored:
    wanted: list[int] = []
    targets: list[int] = []
    requested: list[tuple[int, ...]] = []
    alternatives = num_sampled = 0
    for i, row in enumerate(rows):
        sequence = row.sequence
        if row.in_prompt or sequence.request.logprobs:
            wanted.append(i)
            own = sequence.tokens[row.position] if row.in_prompt else pending_token(num_sampled)
            targets.append(own)
            alternatives = max(alternatives, sequence.request.top_logprobs)
            requested.append(sequence.request.logprob_token_ids)
        num_sampled += not row.in_prompt
    ids = np.zeros((len(requested), max(map(len, requested), default=0)), dtype=np.int64)
    for i, row_ids in enumerate(requested):
        ids[i, : len(row_ids)] = row_ids
    return _Scored(wanted, targets, alternatives, ids)


def _highest(logprobs: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row, descending, and their ids [rows, count]."""
    if not count:
        return logprobs[:, :0], logprobs[:, :0].long()
    candidates, ids, _ = in_highest_blocks(logprobs, count)
    values, order = candidates.topk(count, dim=-1)
    return values, ids.gather(-1, order)


def _truncates(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.min_p > 0 or bool(params.top_k)
