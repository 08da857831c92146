"""Runs one step on one rank, and keeps the ranks of a replica in lockstep.

The leader sends each step's plan to its followers and then runs the same forward as they do: the
all-reduces inside the layers keep them together. Only the leader looks at the logits.
"""

from collections.abc import Sequence

import numpy as np
import torch

from model_service.engine.block_pool import PROBE_BLOCK
from model_service.engine.plan import StepPlan
from model_service.engine.plan_channel import PlanChannel
from model_service.model.attention import AttentionBackend, SequenceSpan
from model_service.model.network import Transformer

PROBE = StepPlan(
    spans=(SequenceSpan(1, 1, (PROBE_BLOCK,)),),
    tokens=np.zeros(1, dtype=np.int32),
    logit_rows=np.zeros(1, dtype=np.int32),
)


class ModelRunner:
    """One rank's network, its part of the cache, and its end of the plan channel."""

    def __init__(
        self,
        network: Transformer,
        attention: AttentionBackend,
        channel: PlanChannel,
        device: torch.device,
    ) -> None:
        self._network = network
        self._attention = attention
        self._channel = channel
        self._device = device

    def execute(self, plan: StepPlan) -> torch.Tensor:
        """Leader: runs the step on all ranks. Returns logits [num_logits, vocab] in float32."""
        if not self._channel.alone:
            self._channel.send(plan.encode())
        return self._forward(plan)

    def probe(self) -> None:
        """Leader: one token through all shards, to see that they answer; touches no sequence."""
        self.execute(PROBE)

    def warm_up(self, plan: StepPlan) -> torch.Tensor:
        """Every rank: runs a step that nobody sends; all must run the same ones, in one order."""
        return self._forward(plan)

    def release_followers(self) -> None:
        """Leader: lets every follower return from `follow`."""
        self._channel.send(np.empty(0, dtype=np.int32))

    def follow(self) -> None:
        """Follower: runs the leader's steps until it releases this rank."""
        while len(vector := self._channel.receive()):
            self._forward(StepPlan.decode(vector))

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        self._attention.plan(plan.spans)
        logits: torch.Tensor = self._network(
            self._index(plan.tokens),
            self._index(plan.positions),
            self._index(plan.logit_rows),
            self._attention,
        )
        return logits

    def _index(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.long, device=self._device)
