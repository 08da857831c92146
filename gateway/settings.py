"""The gateway's settings; each is a flag and a CHASQUI_* variable."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from gateway.named_streams import StreamLimits
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
    stream_grace: Annotated[
        float,
        Field(ge=0, description="seconds that a named stream is kept while no call reads it"),
    ] = 30.0
    stream_buffer_bytes: Annotated[
        int, Field(ge=1, description="bytes of events kept to resume one named stream")
    ] = 1024 * 1024
    ended_streams_bytes: Annotated[
        int,
        Field(ge=0, description="bytes of events kept of all named streams that have ended"),
    ] = 64 * 1024 * 1024

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
    def stream_limits(self) -> StreamLimits:
        return StreamLimits(
            grace=self.stream_grace,
            buffer_bytes=self.stream_buffer_bytes,
            ended_bytes=self.ended_streams_bytes,
        )
