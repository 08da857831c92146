"""Decode steps as CUDA graphs: one launch instead of hundreds, at fixed batch sizes.

A step whose sequences each have one token is padded to the next larger size that was recorded.
A padding row is a sequence of one token in the probe block, which no sequence owns; its logits are
never read. The recorded kernels read all that changes from step to step from buffers whose
addresses stay the same.
"""

import bisect
import logging
import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from model_service.model.attention.backend import PROBE_BLOCK, AttentionBackend, SequenceSpan
from model_service.model.graphs.recorder import Recorder, Run
from model_service.model.graphs.static_tokens import StaticTokens
from model_service.model.network import Transformer

_log = logging.getLogger(__name__)

PADDING = SequenceSpan(query_length=1, context_length=1, block_table=(PROBE_BLOCK,))


@runtime_checkable
class FixedBatchAttention(Protocol):
    """A backend that can attend at a fixed batch size without asking the host."""

    def fixed_batches(
        self, sizes: Sequence[int], context_length: int
    ) -> dict[int, AttentionBackend]:
        """A backend for decode steps of each of `sizes` sequences, on the same cache.

        Their `attend` reads the plan from buffers that all of them share. So only one of them may
        be planned at a time.
        """


def bucket_sizes(max_batch_size: int) -> list[int]:
    """The batch sizes to record, ascending; from 64 on each is at most an eighth larger."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_batch_size, 32)]
    return [size for size in sizes if size < max_batch_size] + [max_batch_size]


class DecodeGraphs:
    """One recorded forward pass for each batch size."""

    def __init__(
        self,
        network: Transformer,
        attention: FixedBatchAttention,
        *,
        max_batch_size: int,
        context_length: int,
        device: torch.device,
        record: Recorder,
    ) -> None:
        """Records all sizes, the largest first, so that the others fit into its memory.

        All ranks must do so at the same time, because all-reduces are part of the recording.

        Args:
            network: of this rank.
            attention: owns the cache.
            max_batch_size: most sequences of a step.
            context_length: most tokens of a sequence.
            device: of this rank.
            record: on CUDA a `GraphRecorder`.
        """
        started = time.monotonic()
        self._sizes = bucket_sizes(max_batch_size)
        self._attention = attention.fixed_batches(self._sizes, context_length)
        self._tokens = StaticTokens(max_batch_size, device)
        self._logits = torch.empty(
            max_batch_size, network.vocab_size, dtype=torch.float32, device=device
        )
        self._repeat = {size: self._record(network, size, record) for size in reversed(self._sizes)}
        _log.info(
            "decode steps of %d batch sizes up to %d recorded in %.1f s",
            len(self._sizes),
            max_batch_size,
            time.monotonic() - started,
        )

    def forward(
        self,
        spans: Sequence[SequenceSpan],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
    ) -> torch.Tensor | None:
        """A step of the network, like its `forward`.

        Args:
            spans: the sequences, in the order of the flat batch.
            tokens: token ids [num_tokens] on the device.
            positions: position of each token in its own sequence [num_tokens].
            logit_rows: ascending indices of the tokens whose logits are wanted [num_logits].

        Returns:
            Logits [num_logits, vocab] in float32, which the next call overwrites: work on the
            current stream must have read them. None if no recorded size fits this step.
        """
        count = len(spans)
        if count > self._sizes[-1] or any(span.query_length != 1 for span in spans):
            return None
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        self._attention[size].plan([*spans, *[PADDING] * (size - count)])
        self._tokens.fill(tokens, positions, size)
        self._repeat[size]()
        if len(logit_rows) == count:
            return self._logits[:count]
        return self._logits[logit_rows]

    def _record(self, network: Transformer, size: int, record: Recorder) -> Run:
        attention = self._attention[size]
        attention.plan([PADDING] * size)

        def run() -> None:
            network(
                self._tokens.ids[:size],
                self._tokens.positions[:size],
                None,
                attention,
                out=self._logits[:size],
            )

        return record(run)
