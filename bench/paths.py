"""Where benchmarks keep what they make, apart from results."""

from pathlib import Path

WORK_DIR = Path.home() / ".cache" / "chasqui-bench"
