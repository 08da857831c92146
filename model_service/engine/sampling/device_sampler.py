"""Sampling without the host knowing the logits: launched behind a step's forward, read later.

The choices are those of `sampler.sample`, from the same uniform numbers: these depend on seed and
position alone, so they are uploaded before the token in front of them is known. What depends on
parameters (who is greedy, whose vocabulary must be sorted) is decided on the host, what depends on
logits never.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model_service.engine.sampling.device_penalties import PenaltyColumns, PenaltyTables
from model_service.engine.sampling.device_truncation import Rules, draw, draw_truncated
from model_service.engine.sampling.host_sampler import MIN_TEMPERATURE
from model_service.engine.sampling.host_truncation import in_highest_blocks
from model_service.engine.sampling.philox import uniforms
from model_service.engine.sampling.result import StepResult
from model_service.engine.sequence import SamplingParams, Sequence, TokenLogprobs
from model_service.engine.step.batch import LogitRow
from model_service.engine.step.runner import resolve_pending
from model_service.model.pinned_transfer import Download, upload

_LARGEST = torch.finfo(torch.float32).max
_ROWS_SCORED_AT_ONCE = 256  # a whole prompt's logprobs would double the memory of its logits


@dataclass(frozen=True, slots=True)
class Launched:
    """A step's sampling under way."""

    drawn: torch.Tensor  # [draws] int64, on the device
    rows: list[LogitRow]
    draws: list[int]  # rows that draw
    scored: list[int]  # rows whose logprobs are wanted
    download: Download

    def read(self) -> StepResult:
        """What the step made, once the device has made it."""
        drawn, finite, chosen, top_ids, top_values = (
            tensor.tolist() for tensor in self.download.wait()
        )
        result = StepResult({}, {}, {})
        for row, is_finite in zip(self.rows, finite, strict=True):
            if not is_finite:
                result.failed.setdefault(row.sequence, row.position)
        for i, token in zip(self.draws, drawn, strict=True):
            if (sequence := self.rows[i].sequence) not in result.failed:
                result.tokens[sequence] = [(token, i)]
        for i, own, ids, values in zip(self.scored, chosen, top_ids, top_values, strict=True):
            count = self.rows[i].sequence.request.top_logprobs
            top = tuple(zip(ids[:count], values[:count], strict=True))
            result.scores[i] = TokenLogprobs(own, top)
        return result


class DeviceSampler:
    """Launches the sampling of steps, one after the other."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        with torch.inference_mode():
            self._penalties = PenaltyTables(vocab, device)

    def forget(self, sequence: Sequence) -> None:
        """Drops what is held for a sequence that has ended."""
        self._penalties.forget(sequence)

    @torch.inference_mode()
    def launch(self, rows: list[LogitRow], logits: torch.Tensor) -> Launched:
        """Draws for every row behind a prompt, and scores as the requests want it.

        Args:
            rows: of sequences without drafts.
            logits: [len(rows), vocab] float32; a row that is not finite makes its sequence fail.
        """
        draws = [i for i, row in enumerate(rows) if not row.in_prompt]
        drawn = self._draw(self._select(logits, draws), [rows[i] for i in draws])
        scored, targets, most = _targets(rows)
        scores = self._score(self._select(logits, scored), targets, drawn, most)
        # A NaN is both extremes of its row; to look at each logit would take several copies of all.
        extremes = torch.stack((logits.amin(dim=-1), logits.amax(dim=-1)))
        finite = torch.isfinite(extremes).all(dim=0)
        return Launched(drawn, rows, draws, scored, Download((drawn, finite, *scores)))

    def _select(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if len(rows) in (0, len(logits)):
            return logits[: len(rows)]
        (places,) = upload(self._device, np.array(rows, dtype=np.int64))
        return logits[places]

    def _draw(self, logits: torch.Tensor, rows: list[LogitRow]) -> torch.Tensor:
        """One token per row [rows]; any token where the row is not finite."""
        params = [row.sequence.request.sampling for row in rows]
        adjusted = [i for i, each in enumerate(params) if each.has_penalties]
        if not adjusted:
            return self._choose(logits, rows, params)
        settings = [
            (each.repetition_penalty, each.frequency_penalty, each.presence_penalty)
            for each in (params[i] for i in adjusted)
        ]
        held = [self._penalties.slot(rows[i].sequence) for i in adjusted]
        places, slots, columns = upload(
            self._device,
            np.array(adjusted, dtype=np.int64),
            np.array(held, dtype=np.int64),
            np.array(settings, dtype=np.float32),
        )
        penalties = PenaltyColumns(*torch.split(columns, 1, dim=-1))
        changed = self._penalties.apply(logits[places], slots, penalties)
        tokens = self._choose(logits.index_copy(0, places, changed), rows, params)
        self._penalties.note(slots, tokens[places])
        return tokens

    def _choose(
        self, logits: torch.Tensor, rows: list[LogitRow], params: list[SamplingParams]
    ) -> torch.Tensor:
        """`_draw` from logits that are adjusted."""
        sampled = [i for i, each in enumerate(params) if not each.greedy]
        if not sampled:
            return logits.argmax(dim=-1)
        truncated = [i for i in sampled if _truncates(params[i])]
        whole = [i for i in sampled if not _truncates(params[i])]
        order = truncated + whole
        rules = [(each.min_p, each.top_p) for each in (params[i] for i in truncated)]
        places, temperature, uniform, top_k, columns = upload(
            self._device,
            np.array(order, dtype=np.int64),
            np.array([[max(params[i].temperature, MIN_TEMPERATURE)] for i in order], np.float32),
            uniforms(
                np.array([params[i].seed for i in order], dtype=np.uint64),
                np.array([rows[i].position for i in order]),
            )[:, np.newaxis],
            np.array([[params[i].top_k or self._vocab] for i in truncated], dtype=np.int64),
            np.array(rules, dtype=np.float32).reshape(-1, 2),
        )
        in_order = order == [*range(len(rows))]
        scaled = (logits if in_order else logits[places]) / temperature
        probabilities = torch.softmax(scaled.clamp_(-_LARGEST, _LARGEST), dim=-1)
        count = len(truncated)
        parts = []
        if truncated:
            settings = Rules(top_k.reshape(-1, 1), *torch.split(columns, 1, dim=-1))
            parts.append(draw_truncated(probabilities[:count], settings, uniform[:count]))
        if whole:
            parts.append(draw(probabilities[count:], uniform[count:]))
        drawn = torch.cat(parts)
        return drawn if in_order else logits.argmax(dim=-1).index_copy_(0, places, drawn)

    def _score(
        self, logits: torch.Tensor, targets: list[int], drawn: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `sampler.score`: the targets' logprobs [rows], ids and logprobs of the best ones.

        Args:
            logits: [rows, vocab], as the network gave them.
            targets: [rows], tokens as in a plan.
            drawn: [draws], that negative targets stand for.
            most: how many of the most probable tokens to name in each row.
        """
        if not targets:  # the usual case
            return logits[:, 0], logits[:, :0].long(), logits[:, :0]
        most = min(most, self._vocab)
        chosen, top_ids, top_values = [], [], []
        (indices,) = upload(self._device, np.array(targets, dtype=np.int64))
        if min(targets) < 0:
            indices = resolve_pending(indices, drawn)
        parts = (torch.split(tensor, _ROWS_SCORED_AT_ONCE) for tensor in (logits, indices))
        for part, wanted in zip(*parts, strict=True):
            logprobs = torch.log_softmax(part, dim=-1)
            chosen.append(logprobs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
            values, ids = _highest(logprobs, most)
            top_values.append(values)
            top_ids.append(ids)
        return torch.cat(chosen), torch.cat(top_ids), torch.cat(top_values)


def _targets(rows: list[LogitRow]) -> tuple[list[int], list[int], int]:
    """Rows whose logprobs are wanted, of which token (as in a plan), and with how many others."""
    scored: list[int] = []
    targets: list[int] = []
    most = draws = 0
    for i, row in enumerate(rows):
        request = row.sequence.request
        if row.in_prompt or request.logprobs:
            scored.append(i)
            targets.append(row.sequence.tokens[row.position] if row.in_prompt else ~draws)
            most = max(most, request.top_logprobs)
        draws += not row.in_prompt
    return scored, targets, most


def _highest(logprobs: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row, descending, and their ids [rows, count]."""
    if not count:
        return logprobs[:, :0], logprobs[:, :0].long()
    candidates, ids, _ = in_highest_blocks(logprobs, count)
    values, places = candidates.topk(count, dim=-1)
    return values, ids.gather(-1, places)


def _truncates(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.min_p > 0 or bool(params.top_k)
