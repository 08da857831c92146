"""The settings of a `chasqui serve` deployment, and the command lines of its services."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from chasqui.errors import SupervisorError
from llama.model_files import ACCEPTED, ModelFileError, find_tokenizer, no_weights, weight_format

LOOPBACK = "127.0.0.1"
DEFAULT_HTTP_PORT = 8080
GRACE_PERIOD_VARIABLE = "CHASQUI_GRACE_PERIOD"


@dataclass(frozen=True, slots=True)
class Deployment:
    """The services to run; `model_settings` are flags of the model service by name."""

    ckpt_dir: Path
    tokenizer_path: Path
    prompt_format: str | None = None
    model_name: str | None = None
    shards: int = 1
    replicas: int = 1
    host: str = LOOPBACK
    port: int = 0
    http_port: int | None = 0  # 0: no HTTP; None: any free port
    safety: bool = False  # run a safety service with its default rules
    # Services log at level debug instead of info. The supervisor needs their lines of level info.
    debug: bool = False
    model_settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def grace_period(self) -> float:
        """Seconds that running answers get to finish when the services are stopped."""
        given = os.environ.get(GRACE_PERIOD_VARIABLE) or "30"
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not seconds >= 0:
            raise SupervisorError(
                f"{GRACE_PERIOD_VARIABLE} must be a number of seconds, 0 or more, not {given!r}"
            )
        return seconds

    def tokenizer_command(self) -> list[str]:
        return self._command("tokenizer_service", port=0, tokenizer_path=self.tokenizer_path)

    def model_command(self, port: int = 0) -> list[str]:
        # Without --threads, each replica would use all cores.
        share = max(1, (os.cpu_count() or 1) // (self.shards * self.replicas))
        return self._command(
            "model_service",
            port=port,
            shards=self.shards,
            ckpt_dir=self.ckpt_dir,
            tokenizer_path=self.tokenizer_path,
            model_name=self.model_name,
            threads=share if self.replicas > 1 else None,
            **self.model_settings,
        )

    def safety_command(self) -> list[str]:
        return self._command("safety_service", port=0)

    def gateway_command(
        self, tokenizer: str, models: Sequence[str], safety: str | None = None
    ) -> list[str]:
        return self._command(
            "gateway",
            host=self.host,
            port=self.port,
            http_port=self.http_port,
            tokenizer_target=tokenizer,
            model_targets=",".join(models),
            safety_target=safety,
            prompt_format=self.prompt_format,
        )

    def _command(self, module: str, **flags: object) -> list[str]:
        """The command line of a service, with its log in JSON; a flag of None is left out."""
        flags = {
            "host": LOOPBACK,
            "log_format": "json",
            "log_level": "debug" if self.debug else "info",
            "grace_period": self.grace_period,
            **flags,
        }
        given = (_flag(name, value) for name, value in flags.items() if value is not None)
        return [sys.executable, "-m", module, *given]


def deployment_of(ckpt_dir: Path | None, tokenizer_path: Path | None) -> Deployment:
    """A deployment of a checkpoint, by default of the demonstration checkpoint.

    Raises:
        SupervisorError: there is a tokenizer and no checkpoint, the path holds none, or it has no
            tokenizer.
    """
    if ckpt_dir is None:
        if tokenizer_path is not None:
            raise SupervisorError("--tokenizer_path needs --ckpt_dir: give both")
        return demonstration()
    if weight_format(ckpt_dir) is None:
        raise SupervisorError(f"--ckpt_dir: {ckpt_dir} {no_weights(ckpt_dir)}; {ACCEPTED}")
    if tokenizer_path is None:
        try:
            tokenizer_path = find_tokenizer(ckpt_dir).path
        except ModelFileError as error:
            raise SupervisorError(f"--tokenizer_path is needed: {error}") from error
    return Deployment(ckpt_dir, tokenizer_path)


def demonstration() -> Deployment:
    """A deployment of the demonstration checkpoint, which is part of the distribution."""
    folder = Path(str(resources.files("demo") / "checkpoint"))
    if not folder.is_dir():
        raise SupervisorError(f"the demonstration checkpoint is missing: no folder {folder}")
    return Deployment(folder, folder / "tokenizer.model", model_name="chasqui-demo")


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"
