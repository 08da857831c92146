"""The part of one process in a call: rank 0 runs the engine, the other ranks follow its steps.

A call ends on all ranks together, even if it fails or is interrupted: rank 0 releases the other
ranks and broadcasts the results.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model_service.engine.engine import Engine
    from model_service.engine.sequence import GenerationRequest
    from model_service.loading.replica import Replica


@dataclass(slots=True)
class Results:
    """The results of a call: ids and logprobs for each request, in order."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    errors: list[str]
    interrupted: bool = False

    @classmethod
    def of(cls, requests: int) -> "Results":
        return cls([[] for _ in range(requests)], [[] for _ in range(requests)], [])


class Rank:
    """Only one thread may use it."""

    def __init__(self, replica: "Replica") -> None:
        self._replica = replica
        self._engine = replica.engine() if replica.is_leader else None
        self._broken: str | None = None  # why no further call can run

    def use_device(self) -> None:
        """Prepares the thread that will call `run`."""
        device = self._replica.runner.device
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)

    def run(self, requests: "Sequence[GenerationRequest]", abandoned: threading.Event) -> Results:
        """The results of rank 0, on every rank.

        Args:
            requests: with ids that no earlier request had.
            abandoned: ends the call after the running step, if it is set on rank 0.

        Raises:
            KeyboardInterrupt: the call was abandoned on rank 0.
            RuntimeError: an earlier call failed within a step that other ranks took part in.
        """
        if self._broken:
            raise RuntimeError(f"an earlier call failed ({self._broken}): build the model again")
        try:
            if self._engine is None:
                results = self._follow()
            else:
                results = self._lead(self._engine, requests, abandoned)
        except Exception as error:
            if self._replica.info.shards > 1:  # the ranks may be in different steps
                self._broken = str(error)
            raise
        if results.interrupted:
            raise KeyboardInterrupt("interrupted on rank 0")
        return results

    def _follow(self) -> Results:
        self._replica.runner.follow()
        return _broadcast(Results.of(0))

    def _lead(
        self,
        engine: "Engine",
        requests: "Sequence[GenerationRequest]",
        abandoned: threading.Event,
    ) -> Results:
        results = Results.of(len(requests))
        try:
            results.interrupted = not _generate(engine, requests, results, abandoned)
        except Exception as error:
            # The failed step has left the engine half changed.
            self._engine = self._replica.engine()
            results.errors.append(f"rank 0 failed: {error}")
            raise
        finally:
            if self._replica.info.shards > 1:
                self._replica.runner.release_followers()
                _broadcast(results)
        return results


def _generate(
    engine: "Engine",
    requests: "Sequence[GenerationRequest]",
    results: Results,
    abandoned: threading.Event,
) -> bool:
    """Fills `results`; returns whether all requests ended before the call was abandoned."""
    indexes = {request.request_id: index for index, request in enumerate(requests)}
    for request in requests:
        engine.add(request)
    while engine.has_work and not abandoned.is_set():
        for output in engine.step():
            index = indexes[output.request_id]
            results.ids[index] += output.ids
            results.logprobs[index] += (entry.logprob for entry in output.logprobs)
            if output.error:
                results.errors.append(output.error)
    complete = not engine.has_work
    for request in requests:
        engine.cancel(request.request_id)
    while engine.has_work:  # reads the step that was launched
        engine.step()
    return complete


def _broadcast(results: Results) -> Results:
    """Rank 0's results, on every rank."""
    import torch.distributed as dist

    shared = [results]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
