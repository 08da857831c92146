"""How plans travel from the leader to the followers: broadcasts over torch.distributed on the CPU.

A plan's length is not known to its receivers, so the first broadcast has a fixed size and carries
the length with as much of the plan as fits; only a large plan needs a second one.
"""

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

LEADER = 0
FIRST_BROADCAST = 1024  # 32-bit integers; holds the plan of a step with some fifty sequences


class PlanChannel:
    """One rank's end; with a single rank nothing is sent."""

    def __init__(self) -> None:
        self.alone = dist.get_world_size() == 1
        self._first = torch.zeros(FIRST_BROADCAST, dtype=torch.int32)

    def send(self, plan: NDArray[np.int32]) -> None:
        """Leader: gives `plan` to every follower."""
        if self.alone:
            return
        vector = torch.from_numpy(plan)
        fitting = vector[: FIRST_BROADCAST - 1]
        self._first[0] = len(vector)
        self._first[1 : 1 + len(fitting)] = fitting
        dist.broadcast(self._first, src=LEADER)
        if len(vector) > len(fitting):
            dist.broadcast(vector[len(fitting) :].clone(), src=LEADER)

    def receive(self) -> NDArray[np.int32]:
        """Follower: the next plan; waits for it."""
        dist.broadcast(self._first, src=LEADER)
        length = int(self._first[0])
        vector = torch.empty(length, dtype=torch.int32)
        fitting = min(length, FIRST_BROADCAST - 1)
        vector[:fitting] = self._first[1 : 1 + fitting]
        if length > fitting:
            rest = torch.empty(length - fitting, dtype=torch.int32)
            dist.broadcast(rest, src=LEADER)
            vector[fitting:] = rest
        return vector.numpy()
