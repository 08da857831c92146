"""`python -m safety_service`: a classifier by rules, or by a Llama Guard that a gateway serves."""

import asyncio
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

import serving  # noqa: F401  # before grpc
from safety_service.llama_guard import LlamaGuard, read_policy
from safety_service.rules import Rules
from safety_service.server import safety_service
from serving.errors import StartError
from serving.server import serve
from serving.settings import Port, ServerSettings, parse
from serving.telemetry import logs


class SafetySettings(ServerSettings):
    """Serves llama.v1.SafetyService: whether a dialog or a text is safe."""

    port: Port = 50054
    classifier: Annotated[
        Literal["rules", "llama-guard"],
        Field(description="rules searches for words; llama-guard asks a model"),
    ] = "rules"
    rules: Annotated[
        Path | None,
        Field(description="TOML file of rules; default: those of the service"),
    ] = None
    guard_target: Annotated[
        str | None, Field(min_length=1, description="address of a gateway that serves Llama Guard")
    ] = None
    guard_policy: Annotated[
        Path | None,
        Field(
            description="text file of Llama Guard's categories, such as its model card's own; "
            "default: the same categories in other words"
        ),
    ] = None

    @model_validator(mode="after")
    def _guard_has_a_target(self) -> Self:
        if self.classifier == "llama-guard" and self.guard_target is None:
            raise ValueError(
                "--classifier=llama-guard needs --guard_target, the address of a gateway that "
                "serves Llama Guard"
            )
        return self


async def run(settings: SafetySettings) -> None:
    if settings.guard_target is not None and settings.classifier == "llama-guard":
        guard = LlamaGuard(settings.guard_target, read_policy(settings.guard_policy))
        await serve(settings, safety_service(guard, guard.run))
    else:
        await serve(settings, safety_service(Rules.read(settings.rules)))


def main() -> None:
    settings = parse(SafetySettings, prog="python -m safety_service")
    logs.configure(settings)
    try:
        asyncio.run(run(settings))
    except StartError as error:
        logs.exit_with_error(str(error))


if __name__ == "__main__":
    main()
