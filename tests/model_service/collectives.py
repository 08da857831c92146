"""One of two ranks: prints, per kind, the collectives of a step with and without logits."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from model_service.engine.step.plan import StepPlan
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.attention.backend import SequenceSpan


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is called of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.calls[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def count(logit_rows: list[int]) -> dict[str, int]:
    """Collectives of a step with a decoding sequence and a prompt of three tokens."""
    spans = (SequenceSpan(1, 5, (1,)), SequenceSpan(3, 3, (2,)))
    plan = StepPlan(spans, np.arange(4, dtype=np.int32), np.array(logit_rows, dtype=np.int32))
    with Count() as mode:
        runner.warm_up(plan)
    return dict(mode.calls)


runner = load_replica(ReplicaOptions(Path(sys.argv[1]), max_seq_len=64, device="cpu")).runner
# In one write, so that the lines of two ranks stay apart.
sys.stdout.write(json.dumps([count([0, 3]), count([])]) + "\n")
