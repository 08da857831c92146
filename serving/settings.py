"""The settings that every server has, read from flags, then the environment, then defaults.

A service subclasses `ServerSettings` and adds annotated fields; each becomes a flag of the same
name and a `CHASQUI_*` variable, and `--help` lists both. Nothing else reads the environment.
"""

import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

ENV_PREFIX = "CHASQUI_"
# The client's variable, which differs from the gateway's CHASQUI_API_KEYS by one letter.
CLIENT_KEY = "CHASQUI_API_KEY"
# Finds 97 of 100 one-letter mistakes, and takes no service's variable for a misspelt one of
# another's: the closest are max_connection_age and max_connection_idle, 0.865.
_SIMILARITY = 0.87

Port = Annotated[
    int, Field(ge=0, le=65535, description="TCP port to listen on; 0 lets the system choose")
]


class ServerSettings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        # Compose and Kubernetes pass unset variables as empty ones.
        env_ignore_empty=True,
        frozen=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="unset",  # what --help shows as the default of an optional setting
        cli_implicit_flags=True,
        cli_show_env_vars=True,
    )

    host: Annotated[str, Field(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Port = 0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="lowest level that is logged"),
    ] = "info"
    log_format: Annotated[
        Literal["auto", "text", "json"],
        Field(description="format of the logs; auto: text on a terminal, otherwise JSON"),
    ] = "auto"
    grace_period: Annotated[
        float, Field(ge=0, description="seconds for running requests to finish after SIGTERM")
    ] = 30.0
    max_request_bytes: Annotated[
        int, Field(ge=1, le=2**31 - 1, description="maximum bytes of a request message")
    ] = 4 * 1024 * 1024
    max_request_fields: Annotated[
        int,
        Field(
            ge=1,
            description="maximum fields of a request message, nested ones included; eight numbers "
            "in a list count as one field",
        ),
    ] = 100_000
    receive_timeout: Annotated[
        float, Field(gt=0, description="seconds for a request to arrive after its call began")
    ] = 30.0
    max_concurrent_streams: Annotated[
        int, Field(ge=1, le=2**31 - 1, description="maximum simultaneous calls of a connection")
    ] = 1024
    max_connections: Annotated[
        int | None,
        Field(
            ge=1,
            le=2**31 - 1,
            description="maximum simultaneous connections of a port; unset: as many as the limit "
            "of open files allows",
        ),
    ] = None
    max_connection_idle: Annotated[
        float,
        Field(
            gt=0,
            le=2_000_000,
            description="seconds without a call after which a connection is closed",
        ),
    ] = 300.0
    tls_cert: Annotated[
        Path | None, Field(description="PEM file with the server's certificate chain; enables TLS")
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="PEM file with the certificate's private key")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        Field(
            description="PEM file of CA certificates; clients need a certificate from one of them"
        ),
    ] = None
    health_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="additional port, without TLS, for health checks only",
        ),
    ] = None
    metrics_host: Annotated[
        str, Field(min_length=1, description="address to serve Prometheus metrics on")
    ] = "127.0.0.1"
    metrics_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="HTTP port for Prometheus metrics; 0 lets the system choose",
        ),
    ] = None
    otlp_endpoint: Annotated[
        str | None,
        Field(
            pattern=r"^https?://[^\s/]+$",
            description="OTLP collector for traces, for example http://HOST:4317",
        ),
    ] = None
    trace_ratio: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="fraction of the requests to trace, except those that the caller marks as "
            "not sampled; services behind a gateway follow its decision",
        ),
    ] = 1.0

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls_cert and --tls_key belong together: give both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls_client_ca needs --tls_cert and --tls_key")
        return self


S = TypeVar("S", bound=ServerSettings)


def parse(settings_class: type[S], prog: str, argv: Sequence[str] | None = None) -> S:
    """Reads the settings from `argv` (default: the process's own) and the environment.

    If values are invalid, the process ends with status 2 and one line for each on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        flags = CliSettingsSource[S](settings_class, cli_prog_name=prog)
        return CliApp.run(settings_class, cli_args=arguments, cli_settings_source=flags)
    except ValidationError as error:
        problems = [_describe(details) for details in error.errors()]
    except SettingsError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"{prog}: error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def misspelt_variables(
    settings_class: type[ServerSettings], environment: Iterable[str]
) -> dict[str, str]:
    """The CHASQUI_* variables that are almost one of a setting, each with the right one.

    Variables that resemble no setting are left out, because they may be another service's.
    """
    known = [ENV_PREFIX + name.upper() for name in settings_class.model_fields]
    misspelt: dict[str, str] = {}
    for variable in environment:
        name = variable.upper()
        if name.startswith(ENV_PREFIX) and name not in {*known, CLIENT_KEY}:
            setting = name.removeprefix(ENV_PREFIX).lower()
            for nearest in get_close_matches(setting, settings_class.model_fields, 1, _SIMILARITY):
                misspelt[variable] = ENV_PREFIX + nearest.upper()
    return misspelt


def check_value(settings_class: type[ServerSettings], name: str, value: object) -> None:
    """Raises ValueError with the broken rule if `value` is not valid for the setting `name`."""
    adapter = TypeAdapter(settings_class.model_fields[name].rebuild_annotation())
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        rule = _rule(error.errors()[0])
        raise ValueError(f"{name}: {rule}, got {value!r}") from None


def _rule(details: ErrorDetails) -> str:
    cause = details.get("ctx", {}).get("error")
    return str(cause) if isinstance(cause, ValueError) else details["msg"]


def _describe(details: ErrorDetails) -> str:
    rule = _rule(details)
    if not details["loc"]:
        return rule
    name = str(details["loc"][0])
    either = f"--{name} (or {ENV_PREFIX}{name.upper()})"
    if details["type"] == "missing":
        return f"{either} is required"
    return f"{either}: {rule}, got {details['input']!r}"
