"""The ASGI application: the routes, CORS, and what is refused before any endpoint."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.http.endpoint import Door, Endpoint
from gateway.http.exchange import Exchange
from gateway.http.handlers.completions import Completions
from gateway.http.handlers.models import Models, answer_health, answer_version, version
from gateway.http.handlers.scoring import Scoring
from gateway.http.handlers.tokenizing import Tokenizing
from gateway.http.openai.document import openapi_document
from gateway.http.openai.errors import error_body
from gateway.http.openai.fields import Body, ChatCompletionBody, TextCompletionBody
from gateway.http.openai.read_body import reader
from gateway.http.openai.requests import IDEMPOTENCY_KEY, LAST_EVENT_ID
from gateway.http.openai.scoring import ScoreBody
from gateway.http.openai.tokenizing import DetokenizeBody, TokenizeBody
from gateway.http.page.files import page_routes
from gateway.http.rate_limits import HEADERS
from llama.v1 import chat_pb2
from serving.intake.grpc_options import METADATA_BYTES
from serving.telemetry import request_id

_SERVICE = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name


@dataclass(frozen=True, slots=True)
class Api:
    """The handlers of the API."""

    completions: Completions
    scoring: Scoring
    tokenizing: Tokenizing
    models: Models


def application(api: Api, door: Door, origins: Sequence[str]) -> ASGIApp:
    """The application; pages of `origins` may call it from browsers, "*" stands for all."""
    max_fields = door.intake.settings.max_request_fields
    completions, models, tokenizing = api.completions, api.models, api.tokenizing

    def post(path: str, name: str, like: str, handle: "_Handle", body: type[Body]) -> Route:
        endpoint = Endpoint(door, name, f"/{_SERVICE}/{like}", handle, reader(body, max_fields))
        return Route(path, endpoint, methods=["POST"])

    def get(path: str, name: str, like: str | None, handle: "_Handle") -> Route:
        method = None if like is None else f"/{_SERVICE}/{like}"
        return Route(path, Endpoint(door, name, method, handle), methods=["GET"])

    routes = [
        post(
            "/v1/chat/completions",
            "createChatCompletion",
            "ChatComplete",
            completions.chat,
            ChatCompletionBody,
        ),
        post(
            "/v1/completions",
            "createCompletion",
            "TextComplete",
            completions.text,
            TextCompletionBody,
        ),
        post("/v1/score", "score", "Score", api.scoring.score, ScoreBody),
        post("/tokenize", "tokenize", "Tokenize", tokenizing.tokenize, TokenizeBody),
        post("/detokenize", "detokenize", "Detokenize", tokenizing.detokenize, DetokenizeBody),
        get("/tokenizer_info", "tokenizerInfo", "GetModel", tokenizing.info),
        get("/v1/models", "listModels", "GetModel", models.list_all),
        get("/v1/models/{model:path}", "retrieveModel", "GetModel", models.retrieve),
        get("/version", "version", "GetModel", answer_version),
        get("/health", "health", None, partial(answer_health, door.intake.health)),
        get("/openapi.json", "openapi", None, partial(_answer, openapi_document(version()))),
        *page_routes(),
    ]
    middleware = [Middleware(_Bounds)]
    if origins:
        middleware.insert(0, _cors(origins))
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _no_endpoint}
    )


async def _answer(body: object, exchange: Exchange) -> None:
    await exchange.answer(body)


_Handle = Callable[..., Awaitable[None]]


def _cors(origins: Sequence[str]) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=[
            *("Authorization", "Content-Type", IDEMPOTENCY_KEY, LAST_EVENT_ID),
            request_id.METADATA_KEY,
        ],
        expose_headers=[request_id.METADATA_KEY, "Retry-After", "Retry-After-Ms", *HEADERS],
    )


class _Bounds:
    """Refuses a head that is too large, and one whose body has no clear end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        names = [name for name, _ in headers]
        app = self._app
        if sum(len(name) + len(value) for name, value in headers) > METADATA_BYTES:
            app = _refusal(431, f"the headers have more than {METADATA_BYTES} bytes")
        elif scope["http_version"] not in ("1.0", "1.1"):
            app = _refusal(505, "this port speaks HTTP/1.1")
        elif b"content-length" in names and b"transfer-encoding" in names:
            # A proxy that believes the other one would see another request behind this one.
            app = _refusal(400, "Content-Length and Transfer-Encoding exclude each other")
        await app(scope, receive, send)


def _refusal(status: int, message: str) -> Response:
    body = error_body(message, status, "malformed_request")
    return JSONResponse(body, status, {"connection": "close"})


async def _no_endpoint(request: Request, error: Exception) -> Response:
    """The answer where no route fits the path or the method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    call_id = request_id.from_metadata(request.headers.items())
    message = f"no {request.method} {request.url.path[:256]} here: see /openapi.json"
    return JSONResponse(
        error_body(message, status, "not_found" if status == 404 else "method_not_allowed"),
        status,
        {**headers, request_id.METADATA_KEY: call_id},
    )
