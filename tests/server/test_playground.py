"""The playground in a real Chromium: what a person does, and what the page asks the server."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Literal

import pytest

from momaserve.outputs import FinishReason
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from tests.browser import CHROMIUM, FLAGS, NEEDS_BROWSER
from tests.server.fake_engine import (
    BEGIN,
    END,
    TEXT,
    FakeAsyncEngine,
    FakeEngine,
    byte_ids,
    code_ids,
    processor,
)
from tests.server.live import Live, live
from tests.server.test_media import png

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FilePayload, Locator, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = NEEDS_BROWSER
TIMEOUT_MS = 10_000


@pytest.fixture(scope="module")
def browser() -> Generator[Browser, None, None]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def running() -> Generator[Live, None, None]:
    with live() as started:
        yield started


@pytest.fixture
def page(browser: Browser, running: Live) -> Generator[Page, None, None]:
    context = browser.new_context()
    context.set_default_timeout(TIMEOUT_MS)
    opened = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(running.url)
    sync_api.expect(opened.locator("#model")).to_have_text("fake")
    yield opened
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith((running.url, "data:"))] == []


def expect(locator: Locator) -> Any:
    return sync_api.expect(locator)


def ask(page: Page, text: str, mode: str = "Text") -> Locator:
    """Sends a prompt with the keyboard; returns the newest card."""
    page.get_by_text(mode, exact=True).click()
    page.get_by_label("Prompt").fill(text)
    page.get_by_label("Prompt").press("Enter")
    return page.locator(".card").first


def open_gate(fake: FakeAsyncEngine) -> None:
    assert fake.gate is not None
    for _ in range(1000):
        fake.gate.release()


def test_text_is_shown_with_its_speed(page: Page) -> None:
    page.locator("summary").click()
    page.get_by_label("Seed").fill("5")
    card = ask(page, "say hello")
    expect(card.locator(".answer")).to_have_text(f"{TEXT}5")
    expect(card.locator(".asked")).to_have_text("say hello")
    expect(card.locator("footer")).to_contain_text(f"{len(byte_ids(f'{TEXT}5'))} tokens")
    expect(card.locator("footer")).to_contain_text("tokens/s")
    expect(page.locator("#announcer")).to_have_text(f"{TEXT}5")


def test_settings_are_sent_only_when_they_are_set(page: Page, running: Live) -> None:
    running.fake.num_cached_tokens = 3
    card = ask(page, "plain", "Picture")
    expect(card.locator("footer")).to_contain_text("3 prompt tokens cached")
    page.locator("summary").click()
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Picture guidance").fill("2.5")
    page.get_by_label("Longest answer").fill("90")
    expect(ask(page, "set", "Picture").locator("figure img")).to_be_visible()
    mode = OutputMode.IMAGE
    half = Distribution(temperature=0.5)
    assert [submission.params for submission in running.fake.submissions] == [
        SamplingParams(mode=mode),
        SamplingParams(mode=mode, seed=5, text=half, image=half, guidance_scale=2.5, max_tokens=90),
    ]


def test_picture_grows_and_becomes_whole(page: Page, running: Live) -> None:
    fake = running.fake
    fake.gate = asyncio.Semaphore(0)
    card = ask(page, "red apple", "Picture")
    for _ in range(3):  # begin_image and two codes
        running.call(fake.gate.release)
    progress = card.locator("progress")
    expect(progress).to_have_attribute("value", "0.5")
    expect(card.get_by_role("img", name="Picture, still growing")).to_be_visible()
    growing = card.locator("figure img").get_attribute("src")
    running.call(open_gate, fake)
    expect(card.get_by_role("img", name="Picture: red apple")).to_be_visible()
    expect(progress).to_be_hidden()
    assert card.locator("figure img").get_attribute("src") != growing
    assert card.locator("figure img").evaluate("image => image.naturalWidth") == 8
    assert fake.submissions[0].params.mode is OutputMode.IMAGE


def test_both_keep_their_order(page: Page, running: Live) -> None:
    running.fake.answer = lambda params, index: [
        *byte_ids("one"),
        *(BEGIN, *code_ids(1, 2, 3, 4), END),
        *byte_ids("two"),
    ]
    card = ask(page, "both", "Both")
    expect(card.locator("footer")).to_contain_text("12 tokens")
    kinds = card.locator(".answer > *").evaluate_all("nodes => nodes.map(n => n.className)")
    assert kinds == ["words", "picture", "words"]
    expect(card.locator(".words")).to_have_text(["one", "two"])


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_button_and_escape_abort(page: Page, running: Live, how: str) -> None:
    running.fake.gate = asyncio.Semaphore(0)
    card = ask(page, "never ends")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_hidden()

    async def until_started() -> None:
        async with asyncio.timeout(TIMEOUT_MS / 1000):
            await running.fake.started.wait()

    asyncio.run_coroutine_threadsafe(until_started(), running.loop).result()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(card.locator("footer")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Generate")).to_be_visible()

    async def until_idle() -> None:
        async with asyncio.timeout(TIMEOUT_MS / 1000):
            while running.fake.running:
                running.fake.stopped.clear()
                await running.fake.stopped.wait()

    asyncio.run_coroutine_threadsafe(until_idle(), running.loop).result()
    assert running.fake.aborted == [running.fake.submissions[0].request_id]


def test_upload_is_sent_with_the_prompt(page: Page, running: Live) -> None:
    file: FilePayload = {"name": "apple.png", "mimeType": "image/png", "buffer": png(grey=160)}
    page.locator("#file").set_input_files(file)
    expect(page.locator("#attachment-name")).to_have_text("apple.png")
    expect(page.locator("#mode-text")).to_be_checked()  # a question, not a wish
    card = ask(page, "what is this?")
    expect(card.locator(".asked-picture")).to_be_visible()
    expect(card.locator(".answer")).to_contain_text(TEXT.strip())
    ids = running.fake.submissions[0].prompt.token_ids
    assert ids[1:7] == (BEGIN, *code_ids(10, 10, 10, 10), END)
    expect(page.locator("#attachment")).to_be_hidden()  # sent once
    page.locator("#file").set_input_files(file)
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#attachment")).to_be_hidden()
    ask(page, "a word")
    expect(page.locator(".card").first.locator(".answer")).to_contain_text(TEXT.strip())
    assert BEGIN not in running.fake.submissions[1].prompt.token_ids


def test_wrong_file_is_told(page: Page) -> None:
    file: FilePayload = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"}
    page.locator("#file").set_input_files(file)
    expect(page.get_by_role("alert")).to_have_text("a.txt is not a picture.")


def test_errors_are_told_in_place(page: Page, running: Live) -> None:
    page.locator("summary").click()
    page.get_by_label("Temperature").fill("100.5")
    page.locator("#temperature").evaluate("input => input.removeAttribute('max')")
    card = ask(page, "too hot")
    expect(card.get_by_role("alert")).to_contain_text("temperature must be between 0 and 100")
    page.get_by_label("Temperature").fill("")
    running.fake.failure = (2, FinishReason.ERROR)
    card = ask(page, "fails")
    expect(card.get_by_role("alert")).to_have_text("out of luck")
    expect(card.locator(".answer")).to_have_text(TEXT[:2])
    running.fake.failure = None
    expect(ask(page, "again").locator(".answer")).to_contain_text(TEXT.strip())


def test_answers_are_text_not_markup(page: Page, running: Live) -> None:
    evil = "<img src=x onerror=alert(1)>"
    running.fake.answer = lambda params, index: byte_ids(evil)
    card = ask(page, evil)
    expect(card.locator(".answer")).to_have_text(evil)
    expect(card.locator(".asked")).to_have_text(evil)
    assert card.locator(".answer img, .asked img").count() == 0


def test_keyboard_alone_is_enough(page: Page, running: Live) -> None:
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")  # from Picture to Text
    expect(page.locator("#mode-text")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Attach picture")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    page.keyboard.press("Enter")
    card = page.locator(".card").first
    expect(card.locator(".answer")).to_contain_text(TEXT.strip())
    assert card.locator(".asked").inner_text() == "line one\nline two"
    expect(page.get_by_label("Prompt")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(
    page: Page, scheme: Literal["light", "dark"]
) -> None:
    def background() -> str:
        colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    page.emulate_media(color_scheme=scheme)
    system = background()
    page.get_by_role("button", name="Light" if scheme == "dark" else "Dark").click()
    chosen = background()
    assert system != chosen
    page.reload()
    assert background() == chosen  # the choice is kept
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    assert background() == chosen


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_overflows_at_any_width(page: Page, running: Live, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    running.fake.answer = lambda params, index: [
        *byte_ids("w" * 150),
        *(BEGIN, *code_ids(1, 2, 3, 4), END),
    ]
    page.locator("summary").click()
    card = ask(page, "x" * 300, "Both")
    expect(card.locator("footer")).to_contain_text("tokens/s")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_model_without_pictures_offers_text_only(browser: Browser) -> None:
    fake = FakeAsyncEngine(engine=FakeEngine(processor=processor(has_pixels=False)))
    with live(fake) as running:
        page = browser.new_page()
        page.goto(running.url)
        expect(page.locator("#model")).to_have_text("fake")
        expect(page.locator("#mode-image")).to_be_disabled()
        expect(page.locator("#mode-both")).to_be_disabled()
        expect(page.get_by_role("button", name="Attach picture")).to_be_disabled()
        expect(page.locator("#guidance")).to_be_disabled()
        expect(page.locator("#mode-text")).to_be_checked()
        page.close()
