"""The playground in a real browser, on the real demo."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.conftest import LiveServer

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("browser: no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page()
        browser.close()


def test_a_picture_appears_and_is_named(server: LiveServer, page: Page) -> None:
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((server.url, "data:", "blob:"))
            else problems.append(request.url)
        ),
    )
    page.goto(server.url)
    page.fill("#prompt", "red apple")
    page.keyboard.press("Enter")
    card = page.locator(".card").first
    expect(card.locator("footer")).to_contain_text("tokens/s", timeout=60_000)
    picture = card.locator("figure img")
    assert (picture.get_attribute("src") or "").startswith(("data:image/png", "blob:"))
    assert picture.evaluate("image => image.naturalWidth") == 64
    assert problems == []
