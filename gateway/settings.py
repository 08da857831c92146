"""The gateway's settings; each is a flag and a CHASQUI_* variable."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gateway.admission.quota import Bounds
from gateway.generation.safety.options import SafetyOptions
from gateway.http.options import HttpOptions
from gateway.replicas.options import PoolOptions
from gateway.request.options import RequestLimits
from gateway.rpc.named_streams import StreamLimits
from llama.prompt_format.recognition import FormatName
from serving.security.tls import TlsFiles
from serving.settings import Port, ServerSettings

# Seconds, 31 years. gRPC counts deadlines in 64-bit nanoseconds, and a longer one passes at once.
MAX_TIMEOUT = 1e9
DEFAULT_HTTP_PORT = 8080


class GatewaySettings(ServerSettings):
    """Serves llama.v1.ChatService: dialogs and texts in, predictions out."""

    port: Port = 50051
    http_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="TCP port for OpenAI's API over HTTP; 0: none; unset: 8080, or any free "
            "port if --port is 0",
        ),
    ] = None
    http_origins: Annotated[
        str | None,
        Field(
            pattern=r"^(\*|https?://[^\s,/]+(,https?://[^\s,/]+)*)$",
            description="origins of web pages that may call the HTTP API (CORS), separated by "
            "commas; *: all; unset: none",
        ),
    ] = None
    tokenizer_target: Annotated[
        str, Field(min_length=1, description="address of the tokenizer service")
    ] = "127.0.0.1:50052"
    prompt_format: Annotated[
        FormatName,
        Field(
            description="how a dialog becomes a prompt; auto: by the chat template in the model's "
            "files, llama2 if they have none"
        ),
    ] = "auto"
    model_targets: Annotated[
        str,
        Field(
            pattern=r"^[^\s,]+(,[^\s,]+)*$",
            description="addresses of the model replicas' leaders, separated by commas; a DNS name "
            "stands for all of its addresses",
        ),
    ] = "127.0.0.1:50053"
    resolve_interval: Annotated[
        float, Field(gt=0, description="seconds between two DNS lookups of --model_targets")
    ] = 5.0
    replica_hang_timeout: Annotated[
        float,
        Field(
            gt=0,
            le=MAX_TIMEOUT,
            description="seconds without a GetLoad reply (or 3 times as many without an engine "
            "step while sequences run) after which a replica counts as lost",
        ),
    ] = 10.0
    failover_timeout: Annotated[
        float,
        Field(
            ge=0,
            description="seconds that a generation waits for another replica when its own is lost, "
            "and a call for a tokenizer service that is lost",
        ),
    ] = 30.0
    max_queued_sequences: Annotated[
        int, Field(ge=1, description="generations of all requests that may run or wait at once")
    ] = 256
    max_queued_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="prompt and answer tokens that these may take together; unset: no limit",
        ),
    ] = None
    max_running_sequences: Annotated[
        int | None,
        Field(
            ge=1,
            description="generations given to the replicas at once, while the others wait in the "
            "gateway; unset: the replicas' max_batch_size and a quarter more",
        ),
    ] = None
    max_dialogs: Annotated[int, Field(ge=1, description="dialogs or prompts in one request")] = 64
    max_messages: Annotated[int, Field(ge=1, description="messages in one dialog")] = 1024
    max_choices: Annotated[
        int, Field(ge=1, description="answers to one dialog or prompt, the request's n")
    ] = 16
    max_response_bytes: Annotated[
        int,
        Field(
            ge=1024,
            le=2**31 - 1,
            description="bytes of a unary answer; gRPC clients refuse more than 4 MiB by default",
        ),
    ] = 4 * 1024 * 1024
    stream_grace: Annotated[
        float,
        Field(ge=0, description="seconds that a named stream is kept while no call reads it"),
    ] = 30.0
    stream_buffer_bytes: Annotated[
        int, Field(ge=1, description="bytes of events kept to resume one named stream")
    ] = 1024 * 1024
    ended_streams_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="bytes kept of all named streams that have ended: 8 KiB each, plus their "
            "events; beyond it, the key that keeps the most loses its oldest stream",
        ),
    ] = 64 * 1024 * 1024
    max_unread_bytes: Annotated[
        int,
        Field(
            ge=1024,
            description="bytes of each answer that may wait for the client to read them; beyond it "
            "the stream ends with RESOURCE_EXHAUSTED",
        ),
    ] = 1024 * 1024
    max_connection_age: Annotated[
        float | None,
        Field(
            gt=0,
            description="seconds after which a connection takes no new calls, so that clients "
            "spread over gateways; running ones get --grace_period; unset: connections do not age",
        ),
    ] = None
    api_keys: Annotated[
        Path | None,
        Field(description="TOML file of the API keys that callers need; unset: no key is needed"),
    ] = None
    upstream_ca: Annotated[
        Path | None,
        Field(
            description="PEM file of the CA certificates to verify the tokenizer, model and safety "
            "services with; unset: plaintext to them"
        ),
    ] = None
    upstream_cert: Annotated[
        Path | None, Field(description="PEM file with the certificate chain shown to them")
    ] = None
    upstream_key: Annotated[
        Path | None, Field(description="PEM file with that certificate's private key")
    ] = None
    upstream_name: Annotated[
        str | None,
        Field(
            min_length=1,
            description="name that their certificates must have; unset: the name in the address",
        ),
    ] = None

    log_client_addresses: Annotated[
        bool, Field(description="show the addresses of callers in the access log")
    ] = False
    trust_traceparent: Annotated[
        bool,
        Field(
            description="trace every call that its caller samples (traceparent), not only "
            "--trace_ratio of them"
        ),
    ] = False

    @model_validator(mode="after")
    def _upstream_tls_is_complete(self) -> Self:
        if (self.upstream_cert is None) != (self.upstream_key is None):
            raise ValueError("--upstream_cert and --upstream_key belong together: give both")
        if self.upstream_ca is None and (self.upstream_cert or self.upstream_name):
            raise ValueError(
                "--upstream_cert, --upstream_key and --upstream_name need --upstream_ca"
            )
        return self

    safety_target: Annotated[
        str | None,
        Field(
            min_length=1,
            description="address of a safety service that judges every dialog, text and answer; "
            "unset: nothing is judged",
        ),
    ] = None
    safety_on_failure: Annotated[
        Literal["closed", "open"],
        Field(
            description="what happens while the safety service does not answer: closed refuses "
            "with UNAVAILABLE, open answers unjudged"
        ),
    ] = "closed"
    safety_timeout: Annotated[
        float,
        Field(
            gt=0,
            le=MAX_TIMEOUT,
            description="seconds that the safety service has for one judgement",
        ),
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
    def http_options(self) -> HttpOptions | None:
        """None: no HTTP."""
        if self.http_port == 0:
            return None
        port = self.http_port or (self.port and DEFAULT_HTTP_PORT)
        return HttpOptions(port, tuple(filter(None, (self.http_origins or "").split(","))))

    @property
    def upstream_tls(self) -> TlsFiles | None:
        """None: plaintext."""
        if self.upstream_ca is None:
            return None
        return TlsFiles(self.upstream_cert, self.upstream_key, self.upstream_ca)

    @property
    def model_target_list(self) -> list[str]:
        return self.model_targets.split(",")

    @property
    def admission_bounds(self) -> Bounds:
        return Bounds(
            max_sequences=self.max_queued_sequences,
            max_tokens=self.max_queued_tokens,
            max_running=self.max_running_sequences,
        )

    @property
    def pool_options(self) -> PoolOptions:
        return PoolOptions(
            hang_timeout=self.replica_hang_timeout,
            failover_timeout=self.failover_timeout,
            resolve_interval=self.resolve_interval,
        )

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

    @property
    def safety_options(self) -> SafetyOptions | None:
        """None: nothing is judged."""
        if self.safety_target is None:
            return None
        return SafetyOptions(
            target=self.safety_target,
            on_failure=self.safety_on_failure,
            timeout=self.safety_timeout,
            chunk=self.safety_chunk,
        )
