"""The chat page in headless Chromium, used by its visible controls; axe-core judges what it shows.

Chromium and the packages that drive it are large, so they are in no extra, and without them these
tests are skipped. To run them:

    apt-get install chromium
    .venv/bin/pip install playwright axe-playwright-python
    .venv/bin/pytest tests/gateway/test_http_page_in_browser.py

CHROMIUM names a browser that is not on PATH. The tests write the model's answers, so they can stop
one that would never end.
"""

import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llama.v1.model_pb2 import StartSequence, TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from tests.gateway.conftest import RunningGateway, ScriptedModel, StartGateway, StartServer
from tokenizer_service.tokenizer import Tokenizer

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
AXE = importlib.util.find_spec("axe_playwright_python")
playwright = pytest.importorskip("playwright.async_api", reason="the package playwright is absent")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH"),
    pytest.mark.skipif(AXE is None, reason="the package axe-playwright-python is absent"),
]
expect = playwright.expect
expect.set_options(timeout=60_000)  # as long as a busy machine may need


class Page:
    """A page under test, and what it must not do."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda message: self._hear(message, url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._see(request.url, url))

    def _hear(self, message: Any, url: str) -> None:
        # Chromium writes an error for each refusal; the page shows it.
        if message.type in {"error", "warning"} and "the server responded" not in message.text:
            self.complaints.append(message.text)

    def _see(self, address: str, url: str) -> None:
        if not address.startswith((url, "data:", "blob:")):
            self.complaints.append(f"a request to {address}")

    def button(self, name: str | re.Pattern[str], **options: Any) -> Any:
        return self.page.get_by_role("button", name=name, **options)

    async def shows(self, text: str) -> None:
        """Waits until the conversation has a text."""
        await expect(self.page.get_by_role("main").get_by_text(text).last).to_be_visible()

    async def ask(self, text: str) -> None:
        await self.page.get_by_label("Message", exact=True).fill(text)
        await self.page.keyboard.press("Enter")

    async def setting(self, label: str, value: str) -> None:
        """Opens the settings, fills a field, and closes them."""
        await self.page.keyboard.press("Alt+s")
        await self.page.get_by_label(label, exact=True).fill(value)
        await self.page.keyboard.press("Escape")

    async def require_accessible(self) -> None:
        """Has axe-core check contrast, labels, roles and landmarks, light and dark."""
        assert AXE is not None
        assert AXE.origin is not None
        await self.page.evaluate((Path(AXE.origin).parent / "axe.min.js").read_text("utf-8"))
        for scheme in ("dark", "light"):
            await self.page.emulate_media(color_scheme=scheme)
            found = await self.page.evaluate("axe.run()")
            told = [
                (each["id"], node["html"]) for each in found["violations"] for node in each["nodes"]
            ]
            assert not told, scheme


@asynccontextmanager
async def opened(url: str, **context: Any) -> AsyncIterator[Page]:
    """The page at `url` in a new browser; fails if it complained, or asked elsewhere."""
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = Page(await (await browser.new_context(**context)).new_page(), url)
            await page.page.goto(url)
            yield page
            assert not page.complaints
        finally:
            await browser.close()


class Writer:
    """Writes the model's answers."""

    def __init__(self, model: ScriptedModel, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer

    async def started(self) -> tuple[StartSequence, str]:
        """The next sequence, and its prompt as a text."""
        start = await self._model.starts.get()
        return start, self._tokenizer.decode([*start.prompt_ids])

    def write(self, start: StartSequence, text: str, *, ends: bool = True) -> None:
        """Writes more of an answer; its tokens have the probability 0.5."""
        ids = self._tokenizer.encode(text, bos=False, eos=False)
        top = [TopLogprobs(ids=[token, 300], logprobs=[-0.6931, -1.5]) for token in ids]
        count = len(ids)
        details: Any = {"logprobs": [-0.6931] * count, "ranks": [1] * count, "top": top}
        details = details if start.logprobs else {}
        reason: Any = {"finish_reason": FINISH_REASON_STOP} if ends else {}
        self._model.tell(start.sequence_id, ids=ids, **details, **reason)

    async def answer(self, text: str) -> str:
        """Answers the next sequence; returns its prompt."""
        start, prompt = await self.started()
        self.write(start, text)
        return prompt


@pytest.fixture
def writer(model: ScriptedModel, tokenizer: Tokenizer) -> Writer:
    return Writer(model, tokenizer)


async def test_conversation_is_edited_regenerated_and_kept(
    gateway: RunningGateway, writer: Writer
) -> None:
    async with opened(gateway.http_url) as it:
        await it.ask("Hello <img src=x onerror=alert(1)>")
        await writer.answer("Good day")
        await it.shows("Good day")
        await it.shows("Hello <img src=x")
        await it.ask("And then")
        assert "Good day" in await writer.answer("Nothing")
        await it.button("Edit this message").last.click()
        await it.page.get_by_label("Edited message").fill("And now")
        await it.button("Send").first.click()
        prompt = await writer.answer("Something")
        assert ("And now" in prompt, "And then" in prompt) == (True, False)
        await it.shows("Something")
        await it.page.keyboard.press("Alt+r")
        await writer.answer("Anything")
        await it.shows("Anything")
        await it.button("Earlier answer").click()
        await it.shows("Something")
        await it.button("Earlier message").click()
        await it.shows("Nothing")
        await it.require_accessible()
        await it.page.reload()
        await it.shows("Nothing")
        await it.shows("answer tokens")


async def test_stop_cancels_the_sequence_and_keeps_the_text(
    gateway: RunningGateway, writer: Writer, model: ScriptedModel
) -> None:
    async with opened(gateway.http_url) as it:
        await it.ask("Hello")
        start, _ = await writer.started()
        writer.write(start, "Half of it", ends=False)
        await it.shows("Half of it")
        await it.button("Stop").click()
        assert await model.cancels.get() == start.sequence_id
        await it.shows("Stopped.")
        await it.shows("Half of it")
        await it.ask("Go on")
        assert "Half of it" in await writer.answer("The rest")
        await it.shows("The rest")


async def test_tokens_tell_their_probability_to_mouse_and_keyboard(
    gateway: RunningGateway, writer: Writer
) -> None:
    async with opened(gateway.http_url) as it:
        await it.page.keyboard.press("Alt+s")
        await it.page.get_by_label("Show token probabilities").check()
        await it.page.keyboard.press("Escape")
        await it.ask("Hello")
        await writer.answer("Good day")
        tokens = it.page.get_by_role("group", name="Answer: its tokens").get_by_role("button")
        details = it.page.get_by_role("tooltip")
        await tokens.first.hover()
        await expect(details).to_contain_text("50.0 %")
        await expect(details.get_by_role("row")).to_have_count(2)
        await it.require_accessible()
        await it.page.mouse.move(0, 0)
        await expect(details).to_be_hidden()
        await tokens.first.focus()
        await it.page.keyboard.press("ArrowRight")
        await expect(tokens.nth(1)).to_be_focused()
        await expect(details).to_contain_text("logprob -0.693")
        await it.page.keyboard.press("Alt+t")
        await it.shows("Good day")


async def test_several_answers_on_a_phone_and_one_is_continued(
    gateway: RunningGateway, writer: Writer
) -> None:
    async with opened(gateway.http_url, viewport={"width": 360, "height": 700}) as it:
        await it.setting("Number", "2")
        await it.setting("System prompt", "Be brief")
        await it.ask("Hello")
        for text in ("One way", "Another way"):
            assert "Be brief" in await writer.answer(text)
        await it.shows("Another way")
        await it.button("Choose answer 2").click()
        await it.require_accessible()
        width = await it.page.evaluate("document.documentElement.scrollWidth")
        assert width == 360
        chosen = it.page.get_by_role("article", name="Answer").get_by_role("button", pressed=True)
        assert await chosen.text_content() == "Chosen"
        text = await it.page.locator(".choice").nth(1).locator(".prose").text_content()
        await it.setting("Number", "")
        await it.ask("Go on")
        assert text in await writer.answer("Well")


async def test_oldest_turns_are_left_out_of_a_long_dialog(
    gateway: RunningGateway, writer: Writer
) -> None:
    async with opened(gateway.http_url) as it:
        await it.ask(f"First {'word ' * 30}")
        assert "First" in await writer.answer("Good day")
        # Too long for the context, which the page learns when the service refuses it.
        await it.ask(f"Second {'word ' * 45}")
        prompt = await writer.answer("Well")
        assert ("First" in prompt, "Second" in prompt) == (False, True)
        await it.shows("The oldest turn was left out")


async def test_dialogs_are_renamed_exported_and_deleted(
    gateway: RunningGateway, writer: Writer
) -> None:
    async with opened(gateway.http_url) as it:
        await it.ask("Hello")
        await writer.answer("Good day")
        await it.button("Rename Hello").click()
        await it.page.get_by_label("Title").fill("A greeting")
        await it.page.keyboard.press("Enter")
        await expect(it.page.get_by_role("heading", name="A greeting")).to_be_visible()
        await it.page.get_by_text("Export").click()
        async with it.page.expect_download() as download:
            await it.button("Markdown").click()
        saved = await download.value
        assert saved.suggested_filename == "a-greeting.md"
        assert "## Assistant\n\nGood day" in (await saved.path()).read_text()
        await it.button("Delete A greeting").click()
        await it.require_accessible()
        await it.button("Delete", exact=True).click()
        await expect(it.page.get_by_role("listitem")).to_have_count(0)
        await it.page.reload()
        await it.shows("Ask the model something.")


async def test_refusals_are_shown_with_the_services_words(gateway: RunningGateway) -> None:
    async with opened(gateway.http_url) as it:
        await it.setting("Temperature", "101")
        await it.ask("Hello")
        alert = it.page.get_by_role("alert")
        await expect(alert).to_contain_text("temperature: must be 0 to 100, not 101")
        field = it.page.get_by_label("Temperature")
        await expect(field).to_have_attribute("aria-invalid", "true")
        await it.require_accessible()


async def test_without_a_model_the_page_says_so_and_connects_later(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, server = await start_server(model.service())
    await server.aclose()
    gateway = await start_gateway(tokenizer_target, address)
    async with opened(gateway.http_url) as it:
        await it.shows("The service cannot answer now.")
        await expect(it.button(re.compile("Try again"))).to_be_visible()
        await start_server(model.service(), port=int(address.rpartition(":")[2]))
        await expect(it.page.get_by_text("scripted")).to_be_visible()
        await expect(it.page.get_by_role("alert")).to_have_count(0)


async def test_key_is_asked_for_once_and_forgotten_by_a_reload(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
    writer: Writer,
    tmp_path: Path,
) -> None:
    key, keys = "a key that is long enough", tmp_path / "keys.toml"
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys.write_text(f'[[keys]]\nname = "friend"\nsha256 = "{digest}"\n')
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, api_keys=keys)
    await gateway.until(serving=True)
    async with opened(gateway.http_url) as it:
        field = it.page.get_by_role("textbox", name="API key")
        await field.fill("wrong")
        await it.require_accessible()
        await it.page.keyboard.press("Enter")
        await expect(field).to_have_value("")
        await field.fill(key)
        await it.page.keyboard.press("Enter")
        await expect(it.page.get_by_text("scripted")).to_be_visible()
        await it.ask("Hello")
        await writer.answer("Good day")
        await it.shows("Good day")
        stored = await it.page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")
        assert stored == "{}"
        await it.page.reload()
        await expect(it.page.get_by_role("dialog", name="API key")).to_be_visible()
