"""The gateway's settings; each is a flag and a CHASQUI_* variable."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gateway.classifier import SafetyOptions
from gateway.request import RequestLimits
from serving.settings import Port, ServerSettings


class GatewaySettings(ServerSettings):
    """Serves llama.v1.ChatService: dialogs and texts in, predictions out."""

    port: Port = 50051
    tokenizer_target: Annotated[
        str, Field(min_length=1, description="address of the tokenizer service")
    ] = "127.0.0.1:50052"
    model_targets: Annotated[
        str,
        Field(
            pattern=r"^[^\s,]+(,[^\s,]+)*$",
            description="addresses of the model replicas' leaders, separated by commas",
        ),
    ] = "127.0.0.1:50053"
    max_queued_sequences: Annotated[
        int, Field(ge=1, description="generations that may run or wait at once, of all requests")
    ] = 256
    max_dialogs: Annotated[int, Field(ge=1, description="dialogs or prompts in one request")] = 64
    max_messages: Annotated[int, Field(ge=1, description="messages in one dialog")] = 1024
    max_choices: Annotated[
        int, Field(ge=1, description="answers to one dialog or prompt, the request's n")
    ] = 16

    safety_target: Annotated[
        str | None,
        Field(
            min_length=1,
            description="address of a safety service, which then judges every dialog, text and "
            "answer; none: nothing is judged",
        ),
    ] = None
    safety_on_failure: Annotated[
        Literal["closed", "open"],
        Field(
            description="what happens while the safety service does not answer: closed refuses "
            "with UNAVAILABLE, open goes on unjudged"
        ),
    ] = "closed"
    safety_timeout: Annotated[
        float, Field(gt=0, description="seconds that the safety service has for one judgement")
    ] = 5.0
    safety_chunk: Annotated[
        int, Field(ge=1, description="characters of an answer that are judged, then shown, at once")
    ] = 200

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> Self:
        if self.max_dialogs > self.max_queued_sequences:
            raise ValueError(
                f"--max_dialogs ({self.max_dialogs}) must not be above --max_queued_sequences "
                f"({self.max_queued_sequences}): a full request would never be admitted"
            )
        return self

    @property
    def model_target_list(self) -> list[str]:
        return self.model_targets.split(",")

    @property
    def request_limits(self) -> RequestLimits:
        return RequestLimits(
            max_dialogs=self.max_dialogs,
            max_messages=self.max_messages,
            max_choices=self.max_choices,
            max_sequences=self.max_queued_sequences,
        )

    @property
    def safety_options(self) -> SafetyOptions | None:
        """None where nothing is judged."""
        if self.safety_target is None:
            return None
        return SafetyOptions(
            target=self.safety_target,
            on_failure=self.safety_on_failure,
            timeout=self.safety_timeout,
            chunk=self.safety_chunk,
        )
