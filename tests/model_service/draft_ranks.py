"""The answers of a replica without a draft model and with one, as JSON; run as several ranks."""

import dataclasses
import json
import sys
from pathlib import Path

from model_service.engine.engine import Engine
from model_service.engine.scheduling.speculation.costs import DraftCosts
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from tests.model_service.lookahead_ranks import answers


def cheap(rows: int, *_known: object) -> DraftCosts:
    """In place of `DraftCosts.of`: drafts are made however busy the machine is."""
    return DraftCosts(rows, seconds=1.0, row=1e-4, round=1e-3, token=1e-5, spare=10.0)


def main(folder: Path) -> None:
    options = ReplicaOptions(
        folder / "gqa-mp2",
        256,
        max_step_tokens=64,
        dtype="float32",
        device="cpu",
        draft_ckpt_dir=folder / "gqa-mp1",
    )
    replica = load_replica(options)
    if not replica.is_leader:
        assert replica.draft_runner is None
        replica.runner.follow()
        return
    plain = answers(Engine(replica.runner, dataclasses.replace(replica.limits, draft_tokens=0)))
    DraftCosts.of = cheap  # type: ignore[assignment,method-assign]
    engine = replica.engine()
    drafted = answers(engine)
    replica.runner.release_followers()
    print(json.dumps([plain, drafted, engine.load().accepted_tokens]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
