"""The answers of a replica with lookahead, then of one without, as JSON; run as several ranks."""

import dataclasses
import json
import sys
from pathlib import Path

from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            seed,
            tuple(5 + (seed + i) % 90 for i in range(3 + 11 * seed % 40)),
            12,
            SamplingParams(
                temperature=0.9 if seed % 3 else 0.0,
                seed=seed,
                repetition_penalty=1.2 if seed % 4 == 1 else 1.0,
            ),
            stop_ids=frozenset([2, 50, 51]),
        )
        for seed in range(12)
    ]


def answers(engine: Engine) -> dict[str, list[int]]:
    made: dict[str, list[int]] = {}
    for request in requests():
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            made.setdefault(str(output.request_id), []).extend(output.ids)
    return made


def main(folder: str) -> None:
    options = ReplicaOptions(
        Path(folder), 256, max_step_tokens=64, dtype="float32", device="cpu", draft_tokens=0
    )
    replica = load_replica(options)
    if not replica.is_leader:
        replica.runner.follow()
        return
    ahead = dataclasses.replace(replica.limits, lookahead=True)
    made = [answers(Engine(replica.runner, limits)) for limits in (ahead, replica.limits)]
    replica.runner.release_followers()
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
