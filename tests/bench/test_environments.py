from pathlib import Path

import pytest

from bench.baselines.contenders import CONTENDERS
from bench.baselines.environments import RECIPES, REQUIREMENTS, UnavailableError, prepare


def test_peer_that_cannot_be_built_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"building it needs cmake and g\+\+"):
        prepare("llama_cpp", tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_contender_has_an_environment_with_pinned_requirements() -> None:
    wanted = {contender.environment for contender in CONTENDERS.values()} - {"chasqui"}
    assert wanted == RECIPES.keys()
    for name in wanted:
        lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
        assert all("==" in line for line in lines)
