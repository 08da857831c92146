"""Sends plans from the leader to the followers, by broadcasts over torch.distributed on the CPU.

Receivers do not know a plan's length, so the first broadcast has a fixed size and carries the
length with as much of the plan as fits; only a large plan needs a second one. The leader does not
wait until a plan has arrived: an error on its way is raised when the next one is sent. Sampled
tokens travel from device to device, because no host needs them for the next step.
"""

import numpy as np
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group

from model_service.engine.step.plan import PlanDecoder, PlanEncoder, StepPlan, Vector

LEADER = 0
# 32-bit integers; enough for the plan of a step in which 170 sequences decode.
FIRST_BROADCAST = 1024


class PlanChannel:
    """One rank's end; with a single rank nothing is sent."""

    def __init__(self, ranks: int | None = None) -> None:
        """Connects that many ranks; None for all."""
        self.alone = (ranks or dist.get_world_size()) == 1
        self._first = torch.zeros(FIRST_BROADCAST, dtype=torch.int32)
        self._values = self._first.numpy()  # copying in numpy costs a tenth
        self._sending: list[dist.Work] = []  # the last plan
        self._encoder = PlanEncoder()
        self._decoder = PlanDecoder()

    def send(self, plan: StepPlan) -> None:
        """Leader: sends `plan` to every follower."""
        if not self.alone:
            self._send(self._encoder.encode(plan))

    def close(self) -> None:
        """Leader: tells every follower that no further plan comes."""
        if not self.alone:
            self._send(np.empty(0, dtype=np.int32))
            self._finish_sending()

    def receive(self) -> StepPlan | None:
        """Follower: waits for the next plan; None if there is no further one."""
        dist.broadcast(self._first, src=LEADER)
        length = int(self._values[0])
        vector = self._values[1 : 1 + length].copy()
        if length > len(vector):
            rest = torch.empty(length - len(vector), dtype=torch.int32)
            dist.broadcast(rest, src=LEADER)
            vector = np.concatenate([vector, rest.numpy()])
        return self._decoder.decode(vector) if length else None

    def share(self, sampled: torch.Tensor) -> None:
        """All ranks: overwrites `sampled` with the leader's, from device to device."""
        if not self.alone:
            # The group of the all-reduces, because another one would need its own communicator.
            dist.broadcast(sampled, src=LEADER, group=get_model_parallel_group())

    def _send(self, vector: Vector) -> None:
        self._finish_sending()
        fitting = vector[: FIRST_BROADCAST - 1]
        self._values[0] = len(vector)
        self._values[1 : 1 + len(fitting)] = fitting
        self._broadcast(self._first)
        if len(vector) > len(fitting):
            self._broadcast(torch.from_numpy(vector[len(fitting) :]))

    def _broadcast(self, vector: torch.Tensor) -> None:
        if work := dist.broadcast(vector, src=LEADER, async_op=True):
            self._sending.append(work)

    def _finish_sending(self) -> None:
        for work in self._sending:
            work.wait()
        self._sending.clear()
