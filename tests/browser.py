"""The browser that tests drive, how it is started, and what a page may never do."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NEEDS_BROWSER = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"no browser: {CHROMIUM} does not exist (set CHROMIUM)"
)
TIMEOUT_MS = 20_000
"""Nothing here waits for time to pass; a test that gets here hangs."""

_FAILED_CALL = re.compile(r"Failed to load resource: .* status of (\d+) ")


@contextmanager
def started_browser() -> Generator[Browser, None, None]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page did that it should not have done, and whom it asked."""

    url: str
    """Of the page; everything that it asks for must begin like this."""
    refusals: set[int] = field(default_factory=set)
    """Statuses that a test provokes: the browser logs each as an error."""
    problems: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Paths of all requests."""

    def on_console(self, message: ConsoleMessage) -> None:
        refused = _FAILED_CALL.match(message.text)
        if refused and int(refused[1]) in self.refusals:
            return
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def on_request(self, url: str) -> None:
        if url.startswith(("data:", "blob:")):
            return
        self.asked.append(url.removeprefix(self.url))
        if not url.startswith(self.url):
            self.problems.append(f"asked for {url}")

    def num_asked(self, path: str) -> int:
        return self.asked.count(path)


@contextmanager
def watched_page(
    browser: Browser, url: str, *, watch: Watch | None = None, **options: Any
) -> Generator[Page, None, None]:
    """A page of its own context at `url`; fails at the end if it logged an error or a warning,
    or asked for anything that does not begin with `url`.

    Args:
        watch: lets the test look, and allow refusals.
        options: of `Browser.new_context`.
    """
    watch = watch or Watch(url)
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.on("console", watch.on_console)
    page.on("pageerror", lambda error: watch.problems.append(str(error)))
    page.on("request", lambda request: watch.on_request(request.url))
    page.goto(url)
    yield page
    context.close()
    assert watch.problems == []


def expect(locator: Locator) -> Any:
    """Playwright's `expect`, which waits."""
    from playwright.sync_api import expect as playwright_expect

    return playwright_expect(locator)


def ask(page: Page, text: str, mode: str = "Text") -> Locator:
    """Sends a prompt with the keyboard; returns its answer."""
    page.locator("#modes").get_by_text(mode).click()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill(text)
    prompt.press("Enter")
    return page.locator(".answer").last


def choose_routing(page: Page) -> None:
    page.get_by_text("Show routing").click()
