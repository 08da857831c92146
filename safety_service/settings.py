"""The safety service's settings; each is a flag and a CHASQUI_* variable."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serving.settings import Port, ServerSettings


class SafetySettings(ServerSettings):
    """Serves llama.v1.SafetyService: whether a dialog or a text is safe."""

    port: Port = 50054
    classifier: Annotated[
        Literal["rules", "llama-guard"],
        Field(description="rules looks for words, llama-guard asks a model"),
    ] = "rules"
    rules: Annotated[
        Path | None, Field(description="TOML file of rules; unset: the service's own rules")
    ] = None
    guard_target: Annotated[
        str | None, Field(min_length=1, description="address of a gateway that serves Llama Guard")
    ] = None
    guard_policy: Annotated[
        Path | None,
        Field(
            description="text file of Llama Guard's categories, for example from its model card; "
            "unset: the same categories in the service's own words"
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
