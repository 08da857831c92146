"""Greedy answers of checkpoints, as JSON; run as several ranks.

Arguments: the prompts as JSON, the length of the answers, and the folders.
"""

import json
import sys
from pathlib import Path
from typing import Any

from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions


def answers(engine: Engine, prompts: list[list[int]], length: int) -> list[dict[str, list[Any]]]:
    """Ids and logprobs of the answer to each prompt."""
    made: list[dict[str, list[Any]]] = [{"ids": [], "logprobs": []} for _ in prompts]
    indexes: dict[object, int] = {}
    for index, prompt in enumerate(prompts):
        indexes[index] = index
        sampling = SamplingParams(temperature=0.0)
        engine.add(GenerationRequest(index, tuple(prompt), length, sampling, logprobs=True))
    while engine.has_work:
        for output in engine.step():
            answer = made[indexes[output.request_id]]
            answer["ids"] += output.ids
            answer["logprobs"] += (entry.logprob for entry in output.logprobs)
    return made


def main(prompts: str, length: str, *folders: str) -> None:
    made = {}
    for folder in folders:
        options = ReplicaOptions(Path(folder), 128, dtype="float32", device="cpu")
        replica = load_replica(options)
        if not replica.is_leader:
            replica.runner.follow()
            continue
        made[folder] = answers(replica.engine(), json.loads(prompts), int(length))
        replica.runner.release_followers()
    if made:
        print(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
