"""How plans travel from the leader to the followers: broadcasts over torch.distributed on the CPU.

A plan's length is not known to its receivers, so the first broadcast has a fixed size and carries
the length with as much of the plan as fits; only a large plan needs a second one. Drawn tokens
travel from device to device: the host of no rank needs them for the next step.
"""

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group

from model_service.engine.plan import PlanDecoder, PlanEncoder, StepPlan

LEADER = 0
# 32-bit integers; holds the plan of a step in which 170 sequences decode.
FIRST_BROADCAST = 1024


class PlanChannel:
    """One rank's end; with a single rank nothing is sent."""

    def __init__(self) -> None:
        self.alone = dist.get_world_size() == 1
        self._first = torch.zeros(FIRST_BROADCAST, dtype=torch.int32)
        self._encoder = PlanEncoder()
        self._decoder = PlanDecoder()

    def send(self, plan: StepPlan) -> None:
        """Leader: gives `plan` to every follower."""
        if not self.alone:
            self._send(torch.from_numpy(self._encoder.encode(plan)))

    def close(self) -> None:
        """Leader: tells every follower that no plan comes any more."""
        if not self.alone:
            self._send(torch.empty(0, dtype=torch.int32))

    def receive(self) -> StepPlan | None:
        """Follower: the next plan, waiting for it; None when there is no more."""
        dist.broadcast(self._first, src=LEADER)
        length = int(self._first[0])
        vector = torch.empty(length, dtype=torch.int32)
        fitting = min(length, FIRST_BROADCAST - 1)
        vector[:fitting] = self._first[1 : 1 + fitting]
        if length > fitting:
            rest = torch.empty(length - fitting, dtype=torch.int32)
            dist.broadcast(rest, src=LEADER)
            vector[fitting:] = rest
        return self._decoder.decode(vector.numpy()) if length else None

    def share(self, drawn: torch.Tensor) -> None:
        """All ranks: makes `drawn` what the leader's is, in place, on the ranks' devices."""
        if not self.alone:
            # The group of the all-reduces: another one would be another communicator of NCCL's.
            dist.broadcast(drawn, src=LEADER, group=get_model_parallel_group())

    def _send(self, vector: torch.Tensor) -> None:
        fitting = vector[: FIRST_BROADCAST - 1]
        self._first[0] = len(vector)
        self._first[1 : 1 + len(fitting)] = fitting
        dist.broadcast(self._first, src=LEADER)
        if len(vector) > len(fitting):
            dist.broadcast(vector[len(fitting) :].clone(), src=LEADER)
