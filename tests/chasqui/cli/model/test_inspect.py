"""`chasqui model inspect` and the doctor's look at a model: whole ones, and broken set-ups."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chasqui.cli.doctor.files import ModelProbe
from chasqui.cli.doctor.finding import Verdict
from model_service.offline import __main__ as offline
from tests.chasqui.cli.model.broken_models import BROKEN
from tests.command import Run

Break = Callable[[str], Path]


@pytest.fixture
def broken(tmp_path: Path, meta_model: Path, hf_model: Path) -> Break:
    """Makes one of the set-ups of BROKEN."""

    def make(name: str) -> Path:
        folder = tmp_path / "broken"
        start = {"meta": meta_model, "hf": hf_model}.get(BROKEN[name].start)
        if start is None:
            folder.mkdir()
        else:
            shutil.copytree(start, folder)
        BROKEN[name].damage(folder)
        return folder

    return make


@pytest.mark.parametrize("name", BROKEN)
def test_inspect_names_the_fault_and_the_remedy(
    name: str, broken: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        offline.main(["inspect", str(broken(name))])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    told = printed.out + printed.err
    assert BROKEN[name].culprit in told
    assert BROKEN[name].fix in told
    assert "Traceback" not in told


@pytest.mark.parametrize("name", BROKEN)
def test_doctor_names_the_fault_and_the_remedy(name: str, broken: Break) -> None:
    findings = [*ModelProbe(broken(name), None).findings()]
    told = "\n".join(str(each) for each in findings if each.verdict is Verdict.WRONG)
    assert BROKEN[name].culprit in told
    assert BROKEN[name].fix in told


@pytest.mark.parametrize("form", ["meta", "hf"])
def test_a_whole_model_is_described(form: str, request: pytest.FixtureRequest, run: Run) -> None:
    folder = request.getfixturevalue(f"{form}_model")
    done = run("model", "inspect", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["config"]["dim"] == 64
    assert found["parameters"] == 238_016
    assert found["types"]["float32"]["bytes"] >= 4 * found["parameters"]
    assert found["shards"] == [1, 2, 4]
    assert found["tokenizer"]["tokens"] == found["config"]["vocab_size"] == 560
    assert found["tokenizer"]["prompt_format"] == "llama2"
    assert all(need["fits"] for need in found["memory"][0]["needs"])


def test_a_tokenizer_elsewhere_can_be_named(meta_model: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(meta_model, tmp_path / "model")
    tokenizer = (tmp_path / "model" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    done = run("model", "inspect", str(tmp_path / "model"), "--tokenizer_path", str(tokenizer))
    assert done.returncode == 0, done.stdout
    assert "560 tokens" in done.stdout


def test_inspecting_imports_no_torch(meta_model: Path) -> None:
    program = (
        "import sys; from model_service.offline.__main__ import main\n"
        f"try: main(['inspect', {str(meta_model)!r}])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
