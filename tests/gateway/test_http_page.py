"""The chat page as it is served: its files, their headers, and nothing else."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from gateway.http import page
from tests.gateway.conftest import StartGateway

STATIC = Path(page.__path__[0]) / "static"
FILES = sorted(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*.*"))
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = {
    "default-src 'none'",
    *("script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:"),
    *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    *("require-trusted-types-for 'script'", "trusted-types 'none'"),
}


@pytest.fixture
async def http(
    start_gateway: StartGateway, tokenizer_target: str, tmp_path: Path
) -> AsyncIterator[httpx2.AsyncClient]:
    """A gateway that requires keys; the client has none."""
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "friend"\nsha256 = "{"0" * 64}"\n')
    gateway = await start_gateway(tokenizer_target, "127.0.0.1:9", api_keys=keys)
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as client:
        yield client


async def test_files_need_no_key_and_have_the_strict_headers(http: httpx2.AsyncClient) -> None:
    assert (await http.get("/v1/models")).status_code == 401
    assert len(FILES) > 10
    for path in ["/", *(f"/page/{name}" for name in FILES)]:
        answer = await http.get(path)
        assert answer.status_code == 200, path
        content_type = answer.headers["content-type"].partition(";")[0]
        assert content_type == TYPES[Path(path).suffix or ".html"], path
        assert {*answer.headers["content-security-policy"].split("; ")} == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        name = path.removeprefix("/page/") if path != "/" else "index.html"
        assert answer.content == (STATIC / name).read_bytes()


async def test_unchanged_file_is_not_sent_again(http: httpx2.AsyncClient) -> None:
    first = await http.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = await http.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert (await http.get("/", headers={"if-none-match": '"other"'})).status_code == 200
    head = await http.head("/")
    assert (head.status_code, head.content, head.headers["etag"]) == (
        *(200, b""),
        first.headers["etag"],
    )


async def test_nothing_else_is_served(http: httpx2.AsyncClient) -> None:
    for path in (
        *("/page/", "/page/view", "/page/view/", "/page/none.js", "/index.html"),
        *("/page/../files.py", "/page/..%2ffiles.py", "/page/%2e%2e/files.py"),
        *("/page/..%5cfiles.py", "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/%00"),
        f"/page/{'a' * 300}",
    ):
        answer = await http.get(httpx2.URL(str(http.base_url), raw_path=path.encode()))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path


async def test_page_takes_no_other_methods(http: httpx2.AsyncClient) -> None:
    for path in ("/", "/page/main.js"):
        assert (await http.post(path, json={})).status_code == 405


def test_files_name_no_other_place() -> None:
    for name in FILES:
        text = (STATIC / name).read_text("utf-8")
        addresses = {*re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", text)}
        assert addresses <= {"http://www.w3.org/2000/svg"}, name  # the name of a format
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )


def test_modules_import_what_is_there() -> None:
    for name in FILES:
        path = STATIC / name
        for imported in re.findall(r'from "(\.[^"]+)"', path.read_text("utf-8")):
            assert (path.parent / imported).is_file(), f"{name}: {imported}"
