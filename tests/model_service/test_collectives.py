import json
import subprocess
import sys
from pathlib import Path

LAYERS = 3  # of gqa-mp1


def test_a_step_sums_twice_per_layer_and_gathers_logits_only_where_wanted(golden: Path) -> None:
    script = str(Path(__file__).with_name("collectives.py"))
    launcher = [sys.executable, "-m", "model_service.launcher", "--shards=2"]
    command = [*launcher, script, str(golden / "checkpoints" / "gqa-mp1")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert len(told.splitlines()) == 2
    for line in told.splitlines():
        with_logits, without = json.loads(line)
        # One more gather puts the parts of the embeddings together.
        assert with_logits == {"allreduce_": 2 * LAYERS, "allgather_": 2}
        assert without == {"allreduce_": 2 * LAYERS, "allgather_": 1}
