"""The playground's fields, its API key and what it says of errors, in a real Chromium."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import httpx
import pytest

from momaserve.config import RoutingPolicy
from momaserve.errors import QueueFullError, SamplingError
from momaserve.outputs import FinishReason
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from tests.browser import NEEDS_BROWSER, Watch, ask, expect, started_browser, watched_page
from tests.server.asgi import USER
from tests.server.fake_engine import TEXT
from tests.server.live import Live, live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = NEEDS_BROWSER
KEY = "a-secret-key"


@pytest.fixture(scope="module")
def browser() -> Generator[Browser, None, None]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def running() -> Generator[Live, None, None]:
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


def field(page: Page, name: str) -> Locator:
    return page.locator(f"#field-{name}")


def answered(page: Page, text: str, mode: str = "Text") -> None:
    expect(ask(page, text, mode).locator(".facts")).to_contain_text("first after")


def test_fields_are_sent_only_when_they_are_set(page: Page, running: Live) -> None:
    answered(page, "plain", "Picture")
    numbers = {"temperature": "0.5", "top_p": ".9", "top_k": "-1", "min_p": "1e-3"}
    numbers |= {"image_temperature": "2", "image_top_p": "0.8", "image_top_k": "7"}
    numbers |= {"guidance_scale": "2.5", "seed": str(2**63 - 1), "max_tokens": "90"}
    for name, text in numbers.items():
        field(page, name).fill(text)
    field(page, "routing").select_option("calibrated")
    answered(page, "set", "Picture")
    mode = OutputMode.IMAGE
    assert [submission.params for submission in running.fake.submissions] == [
        SamplingParams(mode=mode),
        SamplingParams(
            mode=mode,
            seed=2**63 - 1,  # more than a JavaScript number can hold
            text=Distribution(temperature=0.5, top_p=0.9, top_k=0, min_p=0.001),
            image=Distribution(temperature=2, top_p=0.8, top_k=7),
            guidance_scale=2.5,
            max_tokens=90,
            routing=RoutingPolicy.CALIBRATED,
        ),
    ]


def test_defaults_of_the_server_stand_in_empty_fields(browser: Browser) -> None:
    with live(max_output_tokens=77) as running, watched_page(browser, running.url) as page:
        expect(field(page, "max_tokens")).to_have_attribute("placeholder", "77")
        expect(field(page, "temperature")).to_have_attribute("placeholder", "1")
        expect(field(page, "image_top_k")).to_have_attribute("placeholder", "0")
        expect(field(page, "seed")).to_have_attribute("placeholder", "random")
        expect(field(page, "routing")).to_contain_text("causal (default)")


BOUNDS = {
    "temperature": ("0", "100", "-0.1", "100.1", "hot", "1e999"),
    "top_p": ("0.01", "1", "0", "1.01"),
    "top_k": ("-1", "0", "5", "-2", "1.5"),
    "min_p": ("0", "1", "-0.1", "1.1"),
    "image_temperature": ("0", "100", "-0.1", "100.1"),
    "image_top_p": ("0.01", "1", "0", "1.01"),
    "image_top_k": ("0", "3", "-1", "0.5"),
    "guidance_scale": ("0", "20", "-0.1", "20.1"),
    "seed": ("0", str(2**63 - 1), "-1", str(2**63), "0.5"),
    "max_tokens": ("1", "0", "1.5"),
}


def test_bounds_are_those_of_the_server(page: Page, running: Live) -> None:
    script = """async (bounds) => {
      const { FIELDS, problemOf } = await import("./playground/settings.js");
      return FIELDS.filter(({ name }) => bounds[name]).map((field) =>
        [field.name, bounds[field.name].map((text) => problemOf(field, text) === null)]);
    }"""
    verdicts: dict[str, list[bool]] = dict(page.evaluate(script, BOUNDS))
    assert verdicts.keys() == BOUNDS.keys()
    with httpx.Client(base_url=running.url) as client:
        for name, texts in BOUNDS.items():
            for text, is_fine in zip(texts, verdicts[name], strict=True):
                sent = '"hot"' if text == "hot" else text
                body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "{name}": {sent}}}'
                reply = client.post("/v1/chat/completions", content=body, headers=JSON)
                assert (reply.status_code == 200) == is_fine, (name, text, reply.text)


JSON = {"Content-Type": "application/json"}


def test_wrong_value_is_marked_and_not_sent(page: Page, running: Live) -> None:
    page.locator("#modes").get_by_text("Text").click()
    field(page, "top_p").fill("2")
    expect(page.locator("#top_p-problem")).to_have_text("must be above 0, at most 1")
    expect(field(page, "top_p")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Look at top_p")
    expect(field(page, "top_p")).to_be_focused()
    assert running.fake.submissions == []
    field(page, "top_p").fill("0.5")
    expect(page.locator("#top_p-problem")).to_be_hidden()
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".answer-body")).to_contain_text(TEXT.strip())
    expect(page.get_by_role("alert")).to_have_count(0)


def test_settings_are_remembered_until_they_are_reset(page: Page, running: Live) -> None:
    field(page, "temperature").fill("0.25")
    page.get_by_label("System prompt").fill("be kind")
    page.locator("#modes").get_by_text("Both").click()
    page.reload()
    expect(field(page, "temperature")).to_have_value("0.25")
    expect(page.get_by_label("System prompt")).to_have_value("be kind")
    expect(page.locator("#mode-both")).to_be_checked()
    page.get_by_role("button", name="Reset settings").click()
    expect(field(page, "temperature")).to_have_value("")
    page.reload()
    expect(field(page, "temperature")).to_have_value("")
    expect(page.get_by_label("System prompt")).to_have_value("")


def test_refused_field_is_told_at_the_answer_and_marked(
    page: Page, running: Live, watch: Watch
) -> None:
    watch.refusals = {400}
    running.fake.refusal = SamplingError("the answer has no room", param="max_tokens")
    answer = ask(page, "hello")
    alert = answer.get_by_role("alert")
    expect(alert).to_contain_text("the answer has no room")
    expect(alert.locator("code")).to_have_text("400 invalid_value")
    expect(page.locator("#max_tokens-problem")).to_have_text("the answer has no room")
    alert.get_by_role("button", name="Show max_tokens").click()
    expect(field(page, "max_tokens")).to_be_focused()
    running.fake.refusal = None
    field(page, "max_tokens").fill("2")
    expect(page.locator("#max_tokens-problem")).to_be_hidden()
    answered(page, "again")


def test_failure_in_a_stream_keeps_what_there_is(page: Page, running: Live) -> None:
    running.fake.failure = (2, FinishReason.ERROR)
    answer = ask(page, "fails")
    expect(answer.get_by_role("alert")).to_contain_text("out of luck")
    expect(answer.locator("code")).to_have_text("generation_failed")
    expect(answer.locator(".answer-body")).to_have_text(TEXT[:2])
    running.fake.failure = None
    answer.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer")).to_have_count(1)
    expect(page.locator(".answer-body")).to_contain_text(TEXT.strip())


def test_full_queue_says_when_to_come_back(page: Page, running: Live, watch: Watch) -> None:
    watch.refusals = {429}
    page.clock.install()
    running.fake.refusal = QueueFullError("8 requests are waiting", retry_after_s=3)
    answer = ask(page, "hello")
    expect(answer.get_by_role("alert")).to_contain_text("Try again in 3 s.")
    again = answer.get_by_role("button", name="Try again in 3 s")
    expect(again).to_be_disabled()
    running.fake.refusal = None
    page.clock.run_for(3000)
    answer.get_by_role("button", name="Try again", exact=True).click()
    expect(page.locator(".answer-body")).to_contain_text(TEXT.strip())


def test_server_that_shuts_down_says_so(page: Page, running: Live, watch: Watch) -> None:
    watch.refusals = {503}
    running.fake.is_draining = True
    alert = ask(page, "hello").get_by_role("alert")
    expect(alert.locator("code")).to_have_text("503 draining")
    expect(alert).to_contain_text("Try again in 5 s.")
    running.fake.is_draining = False


@pytest.fixture
def locked() -> Generator[Live, None, None]:
    with live(api_keys=(KEY,)) as started:
        yield started


def give_key(page: Page, key: str) -> None:
    page.locator("#key").fill(key)
    page.keyboard.press("Enter")


def test_key_is_asked_for_and_kept_for_the_tab(browser: Browser, locked: Live) -> None:
    watch = Watch(locked.url, refusals={401})
    with watched_page(browser, locked.url, watch=watch) as page:
        dialog = page.get_by_role("dialog")
        expect(page.locator("#key")).to_be_focused()
        give_key(page, "wrong")
        expect(dialog).to_contain_text("did not accept that key")
        give_key(page, KEY)
        expect(dialog).to_be_hidden()
        expect(page.locator("#model")).to_have_text("fake")
        expect(page.locator("#gauge-running")).to_have_text("0")
        answered(page, "hello")
        page.reload()
        expect(page.locator("#model")).to_have_text("fake")
        expect(dialog).to_be_hidden()
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        expect(page.locator("#key-state")).to_have_text("Kept until this tab is closed.")
        page.get_by_role("button", name="Forget it").click()
        answer = ask(page, "hello")
        expect(dialog).to_be_visible()
        page.keyboard.press("Escape")
        expect(answer.get_by_role("alert").locator("code")).to_have_text("401 invalid_api_key")
        answer.get_by_role("button", name="Try again").click()
        give_key(page, KEY)
        expect(page.locator(".answer-body")).to_contain_text(TEXT.strip())


def test_key_is_remembered_only_where_that_was_wished(browser: Browser, locked: Live) -> None:
    watch = Watch(locked.url, refusals={401})
    with watched_page(browser, locked.url, watch=watch) as page:
        page.get_by_text("Remember it on this computer").click()
        give_key(page, KEY)
        expect(page.locator("#model")).to_have_text("fake")
        expect(page.locator("#key-state")).to_have_text("Kept on this computer.")
        assert KEY in page.evaluate("JSON.stringify(localStorage)")
        other = page.context.new_page()  # of the same browser, with nothing of the first tab
        other.goto(locked.url)
        expect(other.locator("#model")).to_have_text("fake")
        other.get_by_role("button", name="Forget it").click()
        assert KEY not in other.evaluate("JSON.stringify({ ...localStorage, ...sessionStorage })")


def test_cancelled_dialog_leaves_a_way_back(browser: Browser, locked: Live) -> None:
    watch = Watch(locked.url, refusals={401})
    with watched_page(browser, locked.url, watch=watch) as page:
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#model")).to_contain_text("an API key is needed")
        page.get_by_role("button", name="Try again").click()
        give_key(page, KEY)
        expect(page.locator("#model")).to_have_text("fake")
        expect(page.locator("#model")).to_have_attribute("data-state", "up")


def test_message_of_the_user_is_what_the_server_got(page: Page, running: Live) -> None:
    """The page's plain question is the plain question of any other client."""
    answered(page, USER["content"])
    with httpx.Client(base_url=running.url) as client:
        assert client.post("/v1/chat/completions", json={"messages": [USER]}).status_code == 200
    asked, plain = running.fake.submissions
    assert asked.prompt == plain.prompt
