import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS, SHARDS = 3, 2  # of gqa-mp1, and processes


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_step_sums_twice_per_layer_and_gathers_logits_only_where_wanted(
    golden: Path, port: int
) -> None:
    script = Path(__file__).with_name("collectives.py")
    group = {"WORLD_SIZE": SHARDS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(golden / "checkpoints" / "gqa-mp1")],
            env=os.environ | {name: str(value) for name, value in (group | {"RANK": rank}).items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(SHARDS)
    ]
    for output in [rank.communicate(timeout=120)[0] for rank in ranks]:
        with_logits, without = json.loads(output)
        # One more gather puts the parts of the embeddings together.
        assert with_logits == {"allreduce_": 2 * LAYERS, "allgather_": 2}
        assert without == {"allreduce_": 2 * LAYERS, "allgather_": 1}
