"""Steps of any mixture as CUDA graphs in pieces: between two attentions only rows count.

A step is padded to the next larger number of tokens that was recorded. Its pieces are what the
network computes before, between and behind its layers' attentions, which are planned for the step's
own sequences and launched between two graphs. A prompt, drafts or a mixture with sequences that
decode then take the host one launch a layer and attention's own, instead of ten. Padding is token 0
at the beginning of the probe block; it is not attended.
"""

import bisect
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from model_service.model.attention.backend import PROBE_BLOCK, AttentionBackend, SequenceSpan
from model_service.model.graphs.piecewise_attention import (
    PieceBuffers,
    PiecewiseAttention,
    SeparableAttention,
)
from model_service.model.graphs.recorder import Recorder, Run
from model_service.model.graphs.static_tokens import StaticTokens
from model_service.model.network import Hidden, Transformer

_log = logging.getLogger(__name__)

# Tokens of steps. Above 128 padding takes time, so each size is at most a quarter larger than the
# one below. Kernels for few rows end at 16, 64 and 256, and those for 4 bits take longer for every
# 16. Steps above 512 take the device longer than their launch takes the host.
SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# A token in the probe block: recording asks for no more.
_ONE_TOKEN = (SequenceSpan(query_length=1, context_length=1, block_table=(PROBE_BLOCK,)),)


def sizes_up_to(max_step_tokens: int) -> tuple[int, ...]:
    """The sizes to record, so that they serve steps of so many tokens, if any size does."""
    return SIZES[: bisect.bisect_left(SIZES, max_step_tokens) + 1]


class _Recorded(NamedTuple):
    """The steps of one size."""

    attention: AttentionBackend
    repeat: Run
    hidden: Hidden  # which `repeat` overwrites


class PiecewiseGraphs:
    """One recorded network up to its last layer for each of `SIZES`."""

    def __init__(
        self,
        network: Transformer,
        attention: SeparableAttention,
        *,
        max_step_tokens: int,
        device: torch.device,
        record: Recorder,
    ) -> None:
        """Records all sizes, the largest first, so that the others fit into its memory.

        All ranks must do so at the same time, because all-reduces are part of the recording.

        Args:
            network: of this rank.
            attention: owns the cache.
            max_step_tokens: most tokens of a step.
            device: of this rank.
            record: on CUDA a `GraphRecorder`.
        """
        started = time.monotonic()
        self._sizes = sizes_up_to(max_step_tokens)
        self._network = network
        self._tokens = StaticTokens(self.max_tokens, device)
        buffers = PieceBuffers.of(
            self.max_tokens, _heads(network), network.norm.weight.dtype, device
        )
        self._steps: dict[int, _Recorded] = {}
        for size in reversed(self._sizes):
            backend = PiecewiseAttention(attention, buffers.first(size), record.between)
            self._steps[size] = self._record(size, backend, record)
        _log.info(
            "steps with prompts or drafts of %d sizes up to %d tokens recorded in %.1f s",
            len(self._sizes),
            self.max_tokens,
            time.monotonic() - started,
        )

    @property
    def max_tokens(self) -> int:
        """The most tokens of a step that is recorded."""
        return self._sizes[-1]

    def forward(
        self,
        spans: Sequence[SequenceSpan],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
    ) -> torch.Tensor | None:
        """A step of the network, as `DecodeGraphs.forward`, but logits are in new memory."""
        count = len(tokens)
        if count > self.max_tokens:
            return None
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        step = self._steps[size]
        step.attention.plan(spans)
        self._tokens.fill(tokens, positions, size)
        with torch.inference_mode():
            step.repeat()
            x, residual = step.hidden
            hidden = x[:count], None if residual is None else residual[:count]
            return self._network.logits(hidden, logit_rows)

    def _record(self, size: int, attention: AttentionBackend, record: Recorder) -> _Recorded:
        attention.plan(_ONE_TOKEN)
        ids, positions = self._tokens.ids[:size], self._tokens.positions[:size]
        made: list[Hidden] = []

        @torch.inference_mode()
        def run() -> None:
            made[:] = [self._network.hidden(ids, positions, attention)]

        return _Recorded(attention, record(run), made[0])


def _heads(network: Transformer) -> tuple[int, int]:
    """Query heads of this rank, and the features of one."""
    attention: Any = network.get_submodule("layers.0.attention")
    return attention.heads, attention.head_dim
