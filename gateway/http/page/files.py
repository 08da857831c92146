"""Serves the chat page: files of this package, with headers that forbid it everything else."""

from collections.abc import Sequence
from os import stat_result
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import PathLike, StaticFiles
from starlette.types import Scope

_FOLDER = Path(__file__).parent / "static"
_START = "index.html"
# The browser enforces that the page loads nothing from elsewhere, talks to this server alone, and
# makes no HTML of a text (trusted types).
_CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    ]
)
_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # The browser asks every time, and gets 304 while its ETag holds.
    "cache-control": "no-cache",
}


class _Files(StaticFiles):
    """The files, with the page's headers."""

    def file_response(
        self, full_path: PathLike, stat_result: stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_HEADERS)
        return response


def page_routes() -> Sequence[BaseRoute]:
    """The page at `/`, and its other files below `/page`. They need no API key."""
    files = _Files(directory=_FOLDER)

    async def start(request: Request) -> Response:
        return await files.get_response(_START, request.scope)

    return [Route("/", start), Mount("/page", files)]
