"""Keys that the command makes, and flags that contradict each other."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from chasqui.cli.main import main
from client import Client
from serving.security.keys import KeyRing


def test_new_key_opens_with_all_that_is_printed_below_it(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["keys", "new", "--name", "ada"]).stdout
    key, _, entry = printed.partition("\n\n")
    file = tmp_path / "keys.toml"
    file.write_text(entry)
    ring = KeyRing(file, {"test.Echo": "generate"})
    assert ring.authorize("/test.Echo/Say", [("authorization", f"Bearer {key}")]).name == "ada"
    assert key not in entry


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--client_key", __file__, "--tls"], "--client_cert and --client_key belong together"),
        (["--tls_name", "a"], "need --tls or --ca"),
        (["--ca", "absent.pem"], "'absent.pem' does not exist"),
    ],
)
def test_flags_that_do_not_fit_are_wrong_usage(flags: list[str], problem: str) -> None:
    result = CliRunner().invoke(main, ["complete", "Llamas", *flags])
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.parametrize("key", ["", "caf\u00e9", "one\ntwo"])
def test_key_that_cannot_be_sent_is_refused_at_once(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII characters"):
        Client(api_key=key)
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    result = CliRunner().invoke(main, ["status", "--api_key_file", str(file)])
    assert result.exit_code == 2
    assert "printable ASCII characters" in result.stderr


def test_name_that_no_file_could_hold_is_wrong_usage() -> None:
    result = CliRunner().invoke(main, ["keys", "new", "--name", 'a"b'])
    assert result.exit_code == 2
    assert "1 to 64 letters" in result.stderr
