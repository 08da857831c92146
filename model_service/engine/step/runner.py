"""Runs one step on one rank, and keeps the ranks of a replica in lockstep.

The leader sends each step's plan to its followers and then runs the same forward as they do: the
sums inside the layers keep them together. Only the leader looks at the logits. On CUDA a
step is only launched here: reading the logits waits for it.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.engine.pending_token import resolve_pending
from model_service.engine.step.plan import StepPlan
from model_service.engine.step.plan_channel import PlanChannel
from model_service.model.attention.backend import (
    PROBE_BLOCK,
    CachedAttention,
    RunsSteps,
    SequenceSpan,
)
from model_service.model.cpu.layers import Scan
from model_service.model.cuda.pinned_transfer import upload
from model_service.model.graphs.step_graphs import StepGraphs
from model_service.model.network import Transformer

Numbers = NDArray[np.int32]

PROBE = StepPlan(
    spans=(SequenceSpan(1, 1, (PROBE_BLOCK,)),),
    tokens=np.zeros(1, dtype=np.int32),
    logit_rows=np.zeros(1, dtype=np.int32),
)


class ModelRunner:
    """One rank's network, its part of the cache, and its end of the plan channel.

    Attributes:
        scan: of the last step's logits, where the kernels made one.
    """

    def __init__(
        self,
        network: Transformer,
        attention: CachedAttention,
        channel: PlanChannel,
        device: torch.device,
        graphs: StepGraphs | None = None,
    ) -> None:
        """Takes over the parts of one rank; with `graphs`, small steps are replayed from them."""
        self.device = device
        self._network = network
        self._attention = attention
        self._channel = channel
        self.graphs = graphs
        self.scan: Scan | None = None
        self._run_step: Callable[[Numbers, Numbers], tuple[torch.Tensor, Scan]] | None = None
        if isinstance(attention, RunsSteps) and network.compiled_step is not None:
            self._run_step = partial(attention.run_step, network.compiled_step)
        self._sampled = torch.empty(0, dtype=torch.long, device=device)  # in the last step

    @property
    def recorded_tokens(self) -> int | None:
        """The most tokens of a step with prompts that is recorded; None: nor are others."""
        return None if self.graphs is None else self.graphs.max_tokens

    def execute(self, plan: StepPlan) -> torch.Tensor:
        """Leader: runs the step on all ranks.

        Returns logits [num_logits, vocab] in float32; the next step may overwrite them.
        """
        self._channel.send(plan)
        return self._forward(plan)

    def feed(self, sampled: torch.Tensor) -> None:
        """Leader: gives all ranks the tokens [num_sampled] that the executed plan announced."""
        self._sampled = sampled
        self._channel.share(sampled)

    def probe(self) -> None:
        """Leader: sends one token through all shards, to see that they answer."""
        self.execute(PROBE).cpu()

    def warm_up(self, plan: StepPlan) -> torch.Tensor:
        """Every rank: runs a step without sending it; all must run the same ones, in one order."""
        return self._forward(plan)

    def release_followers(self) -> None:
        """Leader: lets every follower return from `follow`."""
        self._channel.close()

    def follow(self) -> None:
        """Follower: runs the leader's steps until it releases this rank."""
        while (plan := self._channel.receive()) is not None:
            self._forward(plan)
            if plan.num_sampled:
                self._sampled = torch.empty(plan.num_sampled, dtype=torch.long, device=self.device)
                self._channel.share(self._sampled)

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        if plan.copies:
            self._attention.copy(plan.copies)
        # Whatever Python and PyTorch do in a step takes long: the weights have passed through the
        # processor's caches since they did it last.
        if self._run_step is not None and not len(self._sampled):
            self._attention.plan(plan.spans)
            logits, self.scan = self._run_step(plan.tokens, plan.logit_rows)
            return logits
        self.scan = None
        tokens, positions, logit_rows = upload(
            self.device,
            plan.tokens.astype(np.int64),
            plan.positions,
            plan.logit_rows.astype(np.int64),
        )
        if plan.tokens.min() < 0:
            tokens = resolve_pending(tokens, self._sampled)
        if self.graphs is not None:
            replayed = self.graphs.forward(plan.spans, tokens, positions, logit_rows)
            if replayed is not None:
                return replayed
        self._attention.plan(plan.spans)
        return self._network.forward(tokens, positions, logit_rows, self._attention)
