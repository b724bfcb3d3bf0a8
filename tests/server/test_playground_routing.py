"""The playground's routing view and its gauges, in a real Chromium."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

from momaserve.outputs import TokenRouting
from tests.browser import (
    NEEDS_BROWSER,
    Watch,
    ask,
    choose_routing,
    expect,
    started_browser,
    watched_page,
)
from tests.server import fake_engine
from tests.server.fake_engine import (
    BEGIN,
    END,
    FIRST_CODE,
    byte_ids,
    code_ids,
    group_of,
)
from tests.server.live import Live, live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def browser() -> Generator[Browser, None, None]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Generator[Live, None, None]:
    """Token t uses expert t % 4 in layer 0; layer 1 is passed by, or has none, or has two."""

    def routing(token_id: int) -> TokenRouting:
        second: tuple[tuple[int, ...] | None, ...] = (None, (), (1, 3))
        experts = ((token_id % 4,), second[token_id % 3])
        return TokenRouting(token_id, group_of(token_id), experts)

    monkeypatch.setattr(fake_engine, "routing", routing)
    with live() as started:
        yield started


@pytest.fixture
def watch(running: Live) -> Watch:
    return Watch(running.url)


@pytest.fixture
def page(browser: Browser, running: Live, watch: Watch) -> Generator[Page, None, None]:
    with watched_page(browser, running.url, watch=watch) as page:
        expect(page.locator("#model")).to_have_text("fake")
        yield page


def table_of(page: Page) -> list[list[str]]:
    """Rows of the table beside the token that is looked at, without the head."""
    rows = page.get_by_role("tooltip").locator("tbody tr")
    return [row.locator("th, td").all_inner_texts() for row in rows.all()]


def chosen(row: list[str]) -> list[str]:
    return [text for text in row[1:] if text != "·"]


def marks(tokens: Locator) -> list[list[str]]:
    """(state, mark) of each element."""
    script = "nodes => nodes.map(node => [node.dataset.state, node.dataset.mark])"
    found: list[list[str]] = tokens.evaluate_all(script)
    return found


def test_each_token_of_text_is_an_element_and_stays_selectable(page: Page, running: Live) -> None:
    ids = byte_ids("aü\nb")
    running.fake.answer = lambda params, index: ids
    choose_routing(page)
    answer = ask(page, "hi")
    tokens = answer.locator(".token")
    expect(tokens).to_have_count(len(ids))
    expect(answer.locator(".facts")).to_contain_text(f"{len(ids)} tokens")
    assert tokens.all_inner_texts() == ["a", "", "ü", "\n", "b"]  # ü is two tokens
    expect(tokens.nth(1)).to_have_class("token fragment")
    answer.locator(".words").select_text()
    assert page.evaluate("getSelection().toString()") == "aü\nb"
    page.locator("label[for=layer-0]").click()
    wanted = [["one", str(token_id % 4)] for token_id in ids[:-1]]
    assert marks(tokens) == [*wanted, ["uncomputed", ""]]
    page.locator("label[for=layer-1]").click()
    second = [["passed", "–"], ["none", "∅"], ["several", "1·3"]]
    assert marks(tokens)[:-1] == [second[token_id % 3] for token_id in ids[:-1]]
    colours = tokens.evaluate_all("nodes => nodes.map(n => getComputedStyle(n).backgroundImage)")
    for state, colour in zip(marks(tokens), colours, strict=True):
        assert ("rgb(86, 180, 233)" in colour and "rgb(204, 121, 167)" in colour) == (
            state[0] == "several"
        )
    params = running.fake.submissions[0].params
    assert params.include_routing
    assert params.logprobs == 0


def test_table_beside_a_token_tells_all_layers(page: Page, running: Live) -> None:
    ids = byte_ids("abc")
    running.fake.answer = lambda params, index: ids
    choose_routing(page)
    answer = ask(page, "hi")
    expect(answer.locator(".facts")).to_contain_text("3 tokens")
    tooltip = page.get_by_role("tooltip")
    answer.locator(".token").nth(0).hover()
    expect(tooltip).to_contain_text('"a"')
    expect(tooltip).to_contain_text(f"id {ids[0]} · text experts")
    second = {0: ["passed by (depth routing)"], 1: ["no expert"], 2: ["1", "3"]}
    assert [chosen(row) for row in table_of(page)] == [[str(ids[0] % 4)], second[ids[0] % 3]]
    answer.locator(".token").nth(2).hover()
    expect(tooltip).to_contain_text("not computed (end of the answer)")
    page.get_by_label("Prompt", exact=True).hover()
    expect(tooltip).to_be_hidden()


def test_map_of_a_picture_is_walked_with_arrow_keys(page: Page, running: Live) -> None:
    ids = code_ids(5, 6, 7, 8)
    running.fake.answer = lambda params, index: [BEGIN, *ids, END]
    choose_routing(page)
    answer = ask(page, "red apple", "Picture")
    cells = answer.get_by_role("gridcell")
    expect(answer.get_by_role("img", name="Picture: red apple")).to_be_visible()
    expect(cells).to_have_count(4)
    tooltip = page.get_by_role("tooltip")
    cells.nth(0).focus()
    walk = [(None, 0), ("ArrowRight", 1), ("ArrowRight", 1), ("ArrowDown", 3), ("ArrowDown", 3)]
    walk += [("Home", 2), ("ArrowLeft", 2), ("ArrowUp", 0), ("End", 1)]
    for key, at in walk:
        if key is not None:
            page.keyboard.press(key)
        expect(cells.nth(at)).to_be_focused()
        expect(tooltip).to_contain_text(f"code {ids[at] - FIRST_CODE}")
        expect(tooltip).to_contain_text(f"row {at // 2 + 1}, column {at % 2 + 1}")
        assert chosen(table_of(page)[0]) == [str(ids[at] % 4)]
    name = f"row 1, column 2, code 6: layer 0: expert {ids[1] % 4}; layer 1: "
    expect(answer.get_by_role("gridcell", name=name)).to_have_count(1)
    assert cells.evaluate_all("nodes => nodes.map(node => node.tabIndex)") == [-1, 0, -1, -1]
    page.locator("label[for=layer-0]").click()
    assert marks(cells) == [["one", str(token_id % 4)] for token_id in ids]
    specials = answer.locator(".marks .token")
    assert [mark[0] for mark in marks(specials)] == ["one", "uncomputed"]


def test_experts_show_while_the_picture_grows(page: Page, running: Live) -> None:
    fake = running.fake
    fake.gate = asyncio.Semaphore(0)
    choose_routing(page)
    cells = ask(page, "red apple", "Picture").get_by_role("gridcell")
    for _ in range(3):  # begin_image and two codes: what the second one used is not known yet
        running.call(fake.gate.release)
    expect(cells.nth(1)).to_have_attribute("data-state", "pending")
    expect(cells.nth(0)).to_have_attribute("data-state", "all")
    cells.nth(1).focus()
    expect(page.get_by_role("tooltip")).to_contain_text("not known yet")
    running.call(fake.gate.release)
    expect(page.get_by_role("tooltip").locator("tbody tr")).to_have_count(2)
    page.keyboard.press("Escape")


def test_view_can_be_switched_off_and_is_remembered(page: Page, running: Live) -> None:
    choose_routing(page)
    answer = ask(page, "red apple", "Both")
    expect(answer.locator(".facts")).to_contain_text("tokens/s")
    expect(answer.get_by_role("grid")).to_be_visible()
    expect(page.locator("#legend-experts li")).to_have_text(["0", "1", "2", "3"])
    choose_routing(page)
    expect(answer.get_by_role("grid")).to_be_hidden()
    expect(page.locator("#routing-bar")).to_be_hidden()
    answer.locator(".token").first.hover()
    expect(page.get_by_role("tooltip")).to_be_hidden()
    choose_routing(page)
    page.reload()
    expect(page.get_by_role("checkbox", name="Show routing")).to_be_checked()
    choose_routing(page)
    expect(ask(page, "plain").locator(".facts")).to_contain_text("tokens/s")
    assert not running.fake.submissions[-1].params.include_routing
    assert running.fake.submissions[-1].params.logprobs is None


def test_several_tokens_in_one_chunk_are_told_apart(page: Page) -> None:
    script = """async (image) => {
      const { TokenStream } = await import("./playground/tokens.js");
      const stream = new TokenStream(image);
      const bytes = (...list) => ({ token: "t", bytes: list });
      const none = (name) => ({ token: name, bytes: null });
      const content = [bytes(104, 105), bytes(0xc3), bytes(0xbc), none("<|begin_image|>"),
        none("token_id:20"), none("token_id:21"), none("<|end_image|>"), none("<|eos|>")];
      stream.push({ token_ids: [1, 2, 3, 8, 20, 21, 9, 0], logprobs: { content },
        routing: [{ group: "text", experts: [[1]] }] });
      stream.push({ token_ids: [8, 22], routing: [{ group: "text", experts: null }] });
      return stream.all.map(({ kind, text, picture, cell, routing }) =>
        [kind, text, picture, cell ?? -1, routing === null]);
    }"""
    image = {"begin_token_id": 8, "end_token_id": 9, "first_token_id": 20, "num_codes": 4}
    assert page.evaluate(script, image) == [
        ["text", "hi", 0, -1, False],
        ["text", "", 0, -1, False],
        ["text", "ü", 0, -1, True],
        ["begin", "", 0, -1, True],
        ["code", "", 0, 0, True],
        ["code", "", 0, 1, True],
        ["end", "", 0, -1, True],
        ["special", "", 1, -1, True],
        ["begin", "", 1, -1, True],
        ["code", "", 1, 0, True],
    ]


def test_metrics_are_read_whatever_their_prefix(page: Page) -> None:
    script = """async (text) => {
      const { stateOf } = await import("./playground/metrics.js");
      return stateOf(text);
    }"""
    for prefix in ("momaserve_", "vllm:", "my_own_"):
        text = (
            f"# HELP {prefix}num_requests_running words\n"
            f"{prefix}num_requests_running_total 9\n"
            f'{prefix}num_requests_running{{model_name="a b"}} 2.0\n'
            f"{prefix}kv_cache_usage_perc 0.25\n"
        )
        assert page.evaluate(script, text) == {
            "numRunning": 2,
            "numWaiting": None,
            "kvUsage": 0.25,
        }


def test_load_is_the_difference_between_two_reads(page: Page) -> None:
    def router(scale: int) -> dict[str, Any]:
        layers = [
            {"layer": 0, "num_tokens": 10 * scale, "expert_tokens": [3 * scale, scale]},
            {"layer": 1, "num_tokens": 10, "expert_tokens": [4, 4]},
        ]
        dense = {"name": "image", "num_experts": 1, "layers": []}
        return {"groups": [{"name": "text", "num_experts": 2, "layers": layers}, dense]}

    script = """async ([older, newer]) => {
      const { loadBetween } = await import("./playground/metrics.js");
      return loadBetween(older, newer);
    }"""
    text, image = page.evaluate(script, [router(1), router(3)])
    assert text["layers"] == [
        {"layer": 0, "shares": [0.75, 0.25]},
        {"layer": 1, "shares": None},
    ]
    assert text["meanExperts"] == pytest.approx(8 / 20)
    assert image == {"name": "image", "numExperts": 1, "meanExperts": None, "layers": []}
    assert page.evaluate(script, [None, router(1)])[0]["meanExperts"] == pytest.approx(12 / 20)


def test_gauges_follow_a_run_and_leave_an_idle_server_alone(
    browser: Browser, running: Live, watch: Watch
) -> None:
    with watched_page(browser, running.url, watch=watch) as page:
        page.clock.install()
        page.goto(running.url)
        gauge = page.locator("#gauge-running")
        expect(gauge).to_have_text("0")
        expect(page.locator("#gauge-kv")).to_have_text("25 %")
        seen = watch.num_asked("/metrics")
        page.clock.run_for(60_000)
        assert watch.num_asked("/metrics") == seen  # nothing runs
        running.fake.gate = asyncio.Semaphore(0)
        ask(page, "slow")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        for _ in range(4):
            with page.expect_response("**/metrics"):
                page.clock.run_for(1000)
        expect(gauge).to_have_text("1")
        page.evaluate(HIDE)
        page.clock.run_for(5_000)
        seen = watch.num_asked("/metrics")
        page.clock.run_for(60_000)
        assert watch.num_asked("/metrics") == seen  # nobody looks
        page.keyboard.press("Escape")
        with page.expect_response("**/metrics"):
            page.evaluate(SHOW)
        page.clock.run_for(5_000)
        expect(gauge).to_have_text("0")
        seen = watch.num_asked("/metrics")
        page.clock.run_for(60_000)
        assert watch.num_asked("/metrics") == seen


HIDE = """() => {
  Object.defineProperty(document, "hidden", { value: true, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
SHOW = """() => {
  delete document.hidden;
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_gauges_tell_what_the_answer_cost(page: Page, running: Live) -> None:
    running.fake.answer = lambda params, index: byte_ids("fine")
    expect(page.locator("#gauge-spent")).to_have_text("No answer yet.")
    ask(page, "hi")
    expect(page.locator("#gauge-spent")).to_have_text("4 prompt tokens + 4 in the answer")
    expect(page.locator("#gauge-context")).to_have_text("3.1 %")  # 8 of 256
    expect(page.locator("#gauge-first")).to_contain_text("ms")
