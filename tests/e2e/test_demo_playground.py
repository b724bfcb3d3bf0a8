"""The playground in a real browser, on the real demo, whatever the size of its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.browser import (
    NEEDS_BROWSER,
    TIMEOUT_MS,
    ask,
    choose_routing,
    expect,
    started_browser,
    watched_page,
)
from tests.e2e.conftest import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = NEEDS_BROWSER
DRAWING_MS = 3 * TIMEOUT_MS

RECORD = """() => {
  window.record = { sources: [], firstMs: null };
  const turns = document.getElementById("turns");
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      if (!target.matches(".canvas img")) continue;
      record.sources.push(target.src);
      record.firstMs ??= performance.now() - record.sentAt;
    }
  }).observe(turns, { subtree: true, attributes: true, attributeFilter: ["src"] });
  document.addEventListener("submit", () => (record.sentAt = performance.now()), true);
  document.addEventListener("keydown", () => (record.sentAt = performance.now()), true);
}"""


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=DRAWING_MS / 1000) as client:
        yield client


@pytest.fixture(scope="module")
def image(client: httpx.Client) -> dict[str, Any]:
    """What `/v1/models` says of the demo's pictures."""
    described: dict[str, Any] = client.get("/v1/models").json()["data"][0]["image"]
    return described


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Iterator[Page]:
    with watched_page(browser, server.url) as page:
        expect(page.locator("#model")).to_have_attribute("data-state", "up")
        yield page


def metric(client: httpx.Client, name: str) -> float:
    """Sum of a metric over its labels."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"momaserve_{name}"))


def test_a_picture_arrives_row_by_row(page: Page, image: dict[str, Any]) -> None:
    page.evaluate(RECORD)
    answer = ask(page, "red apple", "Picture")
    whole = answer.get_by_role("img", name="Picture: red apple")
    expect(whole).to_be_visible(timeout=DRAWING_MS)
    expect(answer.locator(".facts")).to_contain_text(f"{image['tokens_per_image'] + 2} tokens")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    record = page.evaluate("record")
    assert len(record["sources"]) == image["grid"][0]  # each row, the last one with the whole
    assert record["sources"][-1] == whole.get_attribute("src")
    assert whole.evaluate("image => [image.naturalHeight, image.naturalWidth]") == image["size"]
    print(f"first row after {record['firstMs']:.0f} ms")  # to be seen with `pytest -rP`


def test_heat_map_shows_what_the_api_reports(
    page: Page, client: httpx.Client, image: dict[str, Any]
) -> None:
    choose_routing(page)
    page.get_by_label("seed").fill("7")
    answer = ask(page, "grinning face", "Both")
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=DRAWING_MS)
    body = {"messages": [{"role": "user", "content": "grinning face"}], "seed": 7}
    body |= {"modalities": ["text", "image"], "include_routing": True, "return_token_ids": True}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    routing, first = choice["routing"], image["first_token_id"]
    is_code = [first <= item["token_id"] < first + image["num_codes"] for item in routing]
    tooltip = page.get_by_role("tooltip")
    texts = [item for item, code in zip(routing, is_code, strict=True) if not code]
    assert texts
    shown = [(answer.locator(".token"), texts)]
    codes = [item for item, code in zip(routing, is_code, strict=True) if code]
    shown += [(answer.get_by_role("gridcell"), codes)] if codes else []
    for elements, entries in shown:
        expect(elements).to_have_count(len(entries))
        for at in (0, len(entries) // 2, len(entries) - 1):
            elements.nth(at).focus()
            expect(tooltip).to_contain_text(f"id {entries[at]['token_id']}")
            assert experts_of(page) == entries[at]["experts"]
    page.locator("label[for=layer-0]").click()
    marks = answer.locator(".token").evaluate_all("nodes => nodes.map(n => n.dataset.mark)")
    assert marks == ["" if e is None else mark_of(e[0]) for e in (t["experts"] for t in texts)]


def experts_of(page: Page) -> list[list[int]] | None:
    """What the table beside a token says, as the API would."""
    if page.get_by_role("tooltip").get_by_text("not computed").is_visible():
        return None
    rows = page.get_by_role("tooltip").locator("tbody tr").all()
    return [[int(text) for text in row.locator(".used").all_inner_texts()] for row in rows]


def mark_of(experts: list[int]) -> str:
    return ("" if len(experts) > 2 else "·").join(map(str, experts)) or "∅"


def test_error_is_shown_and_the_page_goes_on(page: Page, client: httpx.Client) -> None:
    page.get_by_label("max_tokens").fill("3")
    answer = ask(page, "define violin")
    expect(answer.locator(".facts")).to_contain_text("cut at the length limit")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body='event: error\ndata: {"error":{"message":"out of luck","code":"engine_dead"}}\n\n'
        ),
    )
    answer = ask(page, "define violin")
    expect(answer.get_by_role("alert")).to_contain_text("out of luck")
    page.unroute("**/v1/chat/completions")
    answer.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer").last.locator(".facts")).to_contain_text("3 tokens")
