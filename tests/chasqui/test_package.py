"""The names that `import chasqui` gives its users."""

import ast
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import chasqui
import client


def test_the_package_hands_on_every_public_name_of_the_client() -> None:
    assert set(chasqui.__all__) == {*client.__all__, "__version__"}
    assert all(getattr(chasqui, name) is getattr(client, name) for name in client.__all__)
    assert chasqui.__version__.count(".") == 2
    # mypy would complain about the comment if it gave a misspelled name a type.
    with pytest.raises(AttributeError, match="has no attribute 'Clint'"):
        _ = chasqui.Clint  # type: ignore[attr-defined]


def test_type_checkers_see_every_name() -> None:
    """They read packages with a `py.typed` and names in an `__all__` that is a literal."""
    for package in (chasqui, client):
        assert (resources.files(package) / "py.typed").is_file()
        module = ast.parse(Path(str(package.__file__)).read_text())
        [listed] = [
            each.value
            for each in module.body
            if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "__all__"
        ]
        assert ast.literal_eval(listed) == package.__all__


def test_importing_the_package_imports_no_service() -> None:
    services = {"gateway", "model_service", "safety_service", "serving", "tokenizer_service"}
    script = "import chasqui, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    imported = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert "chasqui" in imported
    assert not services & set(imported)
