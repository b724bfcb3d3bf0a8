"""The playground in a real browser, on the real demo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser import CHROMIUM, FLAGS, NEEDS_BROWSER
from tests.e2e.conftest import LiveServer

pytestmark = NEEDS_BROWSER


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield browser.new_page()
        browser.close()


def test_a_picture_appears_and_nothing_comes_from_elsewhere(server: LiveServer, page: Page) -> None:
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
    expect(card.locator("footer")).to_contain_text("66 tokens", timeout=60_000)
    expect(page.locator("#send")).to_be_visible()  # done: the picture is whole
    picture = card.locator("figure img")
    assert (picture.get_attribute("src") or "").startswith(("data:image/png", "blob:"))
    assert picture.evaluate("image => image.naturalWidth") == 64
    assert problems == []
