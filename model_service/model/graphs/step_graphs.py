"""The recorded steps of a rank: chooses the graphs that serve a step."""

from collections.abc import Sequence

import torch

from model_service.model.attention.backend import AttentionBackend, SequenceSpan
from model_service.model.graphs.decode_graphs import DecodeGraphs, FixedBatchAttention
from model_service.model.graphs.piecewise_attention import SeparableAttention
from model_service.model.graphs.piecewise_graphs import PiecewiseGraphs
from model_service.model.graphs.recorder import GraphRecorder
from model_service.model.network import Transformer


class StepGraphs:
    """Whole graphs for steps of single tokens, graphs in pieces for others.

    Attributes:
        piecewise: the latter; None launches such steps kernel by kernel.
    """

    def __init__(self, decode: DecodeGraphs, piecewise: PiecewiseGraphs | None) -> None:
        self._decode = decode
        self.piecewise = piecewise

    @property
    def max_tokens(self) -> int:
        """The most tokens of a step with prompts or drafts that is recorded; 0 if none is."""
        return self.piecewise.max_tokens if self.piecewise else 0

    def forward(
        self,
        spans: Sequence[SequenceSpan],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
    ) -> torch.Tensor | None:
        """See `DecodeGraphs.forward`; None if no graph serves the step.

        Every rank makes the same choice, because it depends on the plan alone.
        """
        step = spans, tokens, positions, logit_rows
        logits = self._decode.forward(*step)
        if logits is None and self.piecewise is not None:
            logits = self.piecewise.forward(*step)
        return logits


def record_steps(
    network: Transformer,
    attention: AttentionBackend,
    *,
    max_batch_size: int,
    max_step_tokens: int,
    context_length: int,
    device: torch.device,
) -> StepGraphs | None:
    """Records the steps of this rank; None if device or backend do not allow it."""
    if device.type != "cuda" or not isinstance(attention, FixedBatchAttention):
        return None
    record = GraphRecorder()
    decode = DecodeGraphs(
        network,
        attention,
        max_batch_size=max_batch_size,
        context_length=context_length,
        device=device,
        record=record,
    )
    if not isinstance(attention, SeparableAttention):
        return StepGraphs(decode, None)
    piecewise = PiecewiseGraphs(
        network, attention, max_step_tokens=max_step_tokens, device=device, record=record
    )
    return StepGraphs(decode, piecewise)
