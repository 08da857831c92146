"""Flags, variables, and the lines that wrong ones print."""

from typing import Annotated

import pytest
from pydantic import Field

from serving.settings import Port, ServerSettings, misspelt_variables, parse


class DemoSettings(ServerSettings):
    """Serves as an example."""

    port: Port = 50099
    name: Annotated[str, Field(description="a name, 100% free")]
    verbose: Annotated[bool, Field(description="say more")] = False


def test_flags_go_before_environment_before_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHASQUI_NAME", "from environment")
    monkeypatch.setenv("CHASQUI_GRACE_PERIOD", "5")
    settings = parse(DemoSettings, "demo", ["--name", "from flag", "--verbose"])
    assert settings.name == "from flag"
    assert settings.verbose
    assert settings.grace_period == 5.0
    assert settings.port == 50099
    assert settings.host == "127.0.0.1"


def test_flags_are_read_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["demo", "--name=n", "--port=0"])
    assert parse(DemoSettings, "demo").port == 0


def test_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHASQUI_PORT", "")
    assert parse(DemoSettings, "demo", ["--name", "n"]).port == 50099


def test_help_lists_flags_with_variables_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(DemoSettings, "demo", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert text.startswith("usage: demo")
    assert "Serves as an example." in text
    assert "--name str a name, 100% free (required) [env: CHASQUI_NAME]" in text
    assert "(default: 50099) [env: CHASQUI_PORT]" in text
    assert (
        "server's certificate chain; enables TLS (default: unset) [env: CHASQUI_TLS_CERT]" in text
    )
    for name in DemoSettings.model_fields:
        assert f"--{name}" in text
        assert f"CHASQUI_{name.upper()}" in text


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "demo: error: --name (or CHASQUI_NAME) is required\n"),
        (["--name", "n", "--port", "70000"], "--port (or CHASQUI_PORT): Input should be less than"),
        (["--name", "n", "--port", "x"], "got 'x'\n"),
        (["--name", "n", "--log_level", "loud"], "'debug', 'info', 'warning' or 'error'"),
        (["--nmae", "n"], "demo: error: unrecognized arguments: --nmae n\n"),
    ],
)
def test_wrong_flag_is_explained_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(DemoSettings, "demo", flags)
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_each_wrong_value_gets_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHASQUI_GRACE_PERIOD", "-1")
    with pytest.raises(SystemExit):
        parse(DemoSettings, "demo", ["--port", "-1"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("demo: error: --") for line in lines)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("CHASQUI_MAX_REQUEST_BYTE", "CHASQUI_MAX_REQUEST_BYTES"),
        ("CHASQUI_TLS_CRET", "CHASQUI_TLS_CERT"),
        ("chasqui_gracePeriod", "CHASQUI_GRACE_PERIOD"),
    ],
)
def test_misspelt_variable_is_found_with_the_nearest(variable: str, nearest: str) -> None:
    environment = ["PATH", "CHASQUI_PORT", "chasqui_host", "CHASQUI_OF_ANOTHER_SERVICE", variable]
    assert misspelt_variables(DemoSettings, environment) == {variable: nearest}
