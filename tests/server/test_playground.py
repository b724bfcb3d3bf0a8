"""The playground in a real Chromium: what a person does, and what the page asks the server."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import httpx
import pytest

from momaserve.sampling import OutputMode
from momaserve_server.routes_playground import MEDIA_TYPES
from tests.browser import (
    NEEDS_BROWSER,
    TIMEOUT_MS,
    Watch,
    ask,
    expect,
    started_browser,
    watched_page,
)
from tests.server.fake_engine import (
    BEGIN,
    END,
    TEXT,
    FakeAsyncEngine,
    FakeEngine,
    byte_ids,
    code_ids,
    processor,
    tokenizer,
)
from tests.server.live import Live, live
from tests.server.test_media import png

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FilePayload, Page

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = NEEDS_BROWSER
APPLE: FilePayload = {"name": "apple.png", "mimeType": "image/png", "buffer": png(grey=160)}
GREY: FilePayload = {"name": "grey.png", "mimeType": "image/png", "buffer": png(grey=80)}


@pytest.fixture(scope="module")
def browser() -> Generator[Browser, None, None]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def running() -> Generator[Live, None, None]:
    with live() as started:
        yield started


@pytest.fixture
def page(browser: Browser, running: Live) -> Generator[Page, None, None]:
    with watched_page(browser, running.url) as page:
        expect(page.locator("#model")).to_have_text("fake")
        yield page


def open_gate(fake: FakeAsyncEngine) -> None:
    assert fake.gate is not None
    for _ in range(1000):
        fake.gate.release()


def prompt_of(running: Live) -> tuple[int, ...]:
    """Token ids of the newest request; `<|sep|>` ends each message of the fake's template."""
    return running.fake.submissions[-1].prompt.token_ids


def test_text_is_shown_with_its_speed(page: Page) -> None:
    page.get_by_label("seed").fill("5")
    answer = ask(page, "say hello")
    expect(answer.locator(".answer-body")).to_have_text(f"{TEXT}5")
    expect(page.locator(".question")).to_have_text("say hello")
    facts = answer.locator(".facts")
    expect(facts).to_contain_text(f"{len(byte_ids(f'{TEXT}5'))} tokens")
    expect(facts).to_contain_text("tokens/s")
    expect(facts).to_contain_text("first after")
    expect(page.locator("#announcer")).to_have_text(f"{TEXT}5")
    expect(answer).to_have_attribute("aria-busy", "false")


def test_conversation_goes_with_each_question(page: Page, running: Live) -> None:
    running.fake.answer = lambda params, index: byte_ids("fine")
    page.get_by_label("System prompt").fill("be kind")
    expect(ask(page, "one").locator(".facts")).to_contain_text("4 tokens")
    first = prompt_of(running)
    expect(ask(page, "two").locator(".facts")).to_contain_text("4 tokens")
    assert prompt_of(running)[: len(first)] == first
    words = tokenizer()
    assert words.decode(first) == "be kindone"
    assert words.decode(prompt_of(running)[len(first) :]) == "finetwo"
    page.get_by_text("Earlier turns go with").click()
    expect(ask(page, "one").locator(".facts")).to_contain_text("4 tokens")
    assert prompt_of(running) == first
    page.get_by_text("Earlier turns go with").click()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    expect(ask(page, "one").locator(".facts")).to_contain_text("4 tokens")
    assert prompt_of(running) == first


def test_pictures_of_answers_go_back_and_the_oldest_turns_stay_out(browser: Browser) -> None:
    with live(max_images_per_request=2) as running, watched_page(browser, running.url) as page:
        for text in ("a", "b", "c"):
            answer = ask(page, text, "Picture")
            expect(answer.get_by_role("img", name=f"Picture: {text}")).to_be_visible()
        assert prompt_of(running).count(BEGIN) == 2
        expect(page.locator(".left-out")).to_have_count(0)
        expect(ask(page, "d", "Picture").get_by_role("img", name="Picture: d")).to_be_visible()
        assert prompt_of(running).count(BEGIN) == 2
        expect(page.locator(".left-out")).to_contain_text("The oldest 1 turn did not go with")


def test_last_answer_can_be_made_again(page: Page, running: Live) -> None:
    expect(ask(page, "one").get_by_role("button", name="Regenerate")).to_be_visible()
    answer = ask(page, "two", "Picture")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    page.locator("#modes").get_by_text("Text").click()
    page.get_by_label("seed").fill("7")
    answer.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer").last.get_by_role("img")).to_be_visible()
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator(".question")).to_have_text(["one", "two"])
    before, after = running.fake.submissions[-2:]
    assert (before.prompt, before.params.mode) == (after.prompt, after.params.mode)
    assert (before.params.seed, after.params.seed) == (None, 7)


def test_text_is_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_label("seed").fill("3")
    ask(page, "hello").get_by_role("button", name="Copy text").click()
    expect(page.locator("#announcer")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == f"{TEXT}3"


def test_picture_grows_row_by_row_and_can_be_kept(page: Page, running: Live) -> None:
    fake = running.fake
    fake.gate = asyncio.Semaphore(0)
    answer = ask(page, "Red apple!", "Picture")
    figure = answer.locator("figure")
    for _ in range(2):  # begin_image and a code
        running.call(fake.gate.release)
    expect(figure.locator("progress")).to_have_attribute("value", "1")
    expect(figure).to_contain_text("Row 1 of 2")
    expect(figure.locator("img")).to_be_hidden()  # no row is whole
    running.call(fake.gate.release)
    growing = answer.get_by_role("img", name="Picture, still growing")
    expect(growing).to_have_css("clip-path", "inset(0px 0px 50%)")
    expect(growing).to_have_css("image-rendering", "pixelated")
    source = growing.get_attribute("src")
    running.call(open_gate, fake)
    whole = answer.get_by_role("img", name="Picture: Red apple!")
    expect(whole).to_be_visible()
    expect(figure.locator("progress")).to_be_hidden()
    assert whole.get_attribute("src") != source
    assert whole.evaluate("image => image.naturalWidth") == 8
    assert whole.evaluate("image => image.clientWidth") % 8 == 0
    assert fake.submissions[0].params.mode is OutputMode.IMAGE
    with page.expect_download() as download:
        answer.get_by_text("Download PNG").click()
    assert download.value.suggested_filename == "red-apple.png"
    data = Path(download.value.path()).read_bytes()
    assert data == base64.b64decode((whole.get_attribute("src") or "").partition(",")[2])


def test_both_keep_their_order(page: Page, running: Live) -> None:
    running.fake.answer = lambda params, index: [
        *byte_ids("one"),
        *(BEGIN, *code_ids(1, 2, 3, 4), END),
        *byte_ids("two"),
    ]
    answer = ask(page, "both", "Both")
    expect(answer.locator(".facts")).to_contain_text("12 tokens")
    body = answer.locator(".answer-body > *")
    assert body.evaluate_all("nodes => nodes.map(n => n.className)") == [
        "words",
        "picture",
        "words",
    ]
    expect(answer.locator(".words")).to_have_text(["one", "two"])


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_button_and_escape_abort(page: Page, running: Live, how: str) -> None:
    running.fake.gate = asyncio.Semaphore(0)
    answer = ask(page, "never ends", "Picture")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    for _ in range(2):
        running.call(running.fake.gate.release)
    expect(answer.locator("progress")).to_have_attribute("value", "1")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(answer.locator(".facts")).to_contain_text("stopped")
    expect(answer.locator("figcaption")).to_contain_text("Ended at code 1 of 4")
    expect(page.get_by_role("button", name="Send")).to_be_visible()

    async def until_idle() -> None:
        async with asyncio.timeout(TIMEOUT_MS / 1000):
            while running.fake.running:
                running.fake.stopped.clear()
                await running.fake.stopped.wait()

    asyncio.run_coroutine_threadsafe(until_idle(), running.loop).result()
    assert running.fake.aborted == [running.fake.submissions[0].request_id]
    metrics = httpx.get(f"{running.url}/metrics").text
    assert 'momaserve_requests_aborted_total{reason="disconnect"} 1.0' in metrics
    assert "momaserve_num_requests_running 0.0" in metrics
    expect(page.locator("#gauge-running")).to_have_text("0")
    running.fake.gate = None
    expect(ask(page, "next").locator(".answer-body")).to_contain_text(TEXT.strip())
    assert BEGIN not in prompt_of(running)  # what was never answered is not told again


def test_pictures_are_attached_by_button_paste_and_drop(page: Page, running: Live) -> None:
    thumbnails = page.locator("#attachments li")
    page.locator("#file").set_input_files([APPLE, GREY])
    expect(thumbnails).to_have_count(2)
    expect(page.locator("#mode-text")).to_be_checked()  # a question, not a wish
    page.get_by_role("button", name="Remove apple.png").click()
    expect(thumbnails).to_have_count(1)
    expect(page.get_by_role("button", name="Remove grey.png")).to_be_focused()
    for event in ("paste", "drop"):
        page.evaluate(HAND_OVER, [event, base64.b64encode(png(grey=160)).decode()])
    expect(thumbnails).to_have_count(3)
    answer = ask(page, "what is this?")
    expect(page.locator(".question img")).to_have_count(3)
    expect(answer.locator(".answer-body")).to_contain_text(TEXT.strip())
    pictures = [(BEGIN, *code_ids(*[grey] * 4), END) for grey in (5, 10, 10)]
    assert prompt_of(running)[1:19] == tuple(token_id for ids in pictures for token_id in ids)
    expect(thumbnails).to_have_count(0)  # sent once


HAND_OVER = """([type, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], `${type}.png`, { type: "image/png" }));
  const event = type === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
    : new DragEvent("drop", { dataTransfer: data, bubbles: true });
  document.getElementById("prompt").dispatchEvent(event);
}"""


def test_wrong_files_are_told(browser: Browser) -> None:
    text: FilePayload = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"}
    large: FilePayload = {"name": "b.png", "mimeType": "image/png", "buffer": b"x" * 201}
    limits = live(max_images_per_request=1, max_image_bytes=200)
    with limits as running, watched_page(browser, running.url) as page:
        note = page.get_by_role("alert")
        expect(page.locator("#model")).to_have_text("fake")
        page.locator("#file").set_input_files(text)
        expect(note).to_contain_text("a.txt is not a picture")
        page.locator("#file").set_input_files(large)
        expect(note).to_have_text("b.png has 201 bytes; the limit is 200.")
        page.locator("#file").set_input_files([APPLE, GREY])
        expect(note).to_have_text("A question may have 1 pictures.")
        expect(page.locator("#attachments li")).to_have_count(1)


def test_answers_are_text_not_markup(page: Page, running: Live) -> None:
    evil = "<img src=x onerror=alert(1)>"
    running.fake.answer = lambda params, index: byte_ids(evil)
    answer = ask(page, evil)
    expect(answer.locator(".answer-body")).to_have_text(evil)
    expect(page.locator(".question")).to_have_text(evil)
    assert page.locator(".answer-body img, .question img").count() == 0


def test_keyboard_alone_is_enough(page: Page, running: Live) -> None:
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")  # from Picture to Text
    expect(page.locator("#mode-text")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Attach pictures")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_role("checkbox", name="Show routing")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".answer-body")).to_contain_text(TEXT.strip())
    assert page.locator(".question").inner_text() == "line one\nline two"
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.press("Shift+Tab")  # the layer
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Layer 0")).to_be_checked()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Regenerate")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")  # past Copy, to the one token that Tab leads to
    expect(page.locator(".token").first).to_be_focused()
    expect(page.get_by_role("tooltip")).to_contain_text("id")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(1)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("tooltip")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(
    page: Page, scheme: Literal["light", "dark"]
) -> None:
    def background() -> str:
        colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    other: Literal["light", "dark"] = "light" if scheme == "dark" else "dark"
    page.emulate_media(color_scheme=scheme)
    system = background()
    page.get_by_role("button", name=f"Use {other} colours").click()
    chosen = background()
    assert system != chosen
    page.reload()
    assert background() == chosen  # the choice is kept
    page.emulate_media(color_scheme=other)
    assert background() == chosen


CONTRASTS = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (node) => {
    const colour = numbers(getComputedStyle(node).backgroundColor);
    return colour.length === 3 || colour[3] === 1 ? colour : ground(node.parentElement);
  };
  const found = [];
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const node = words.currentNode.parentElement;
    const isDrawn = node.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    if (!words.currentNode.data.trim() || !isDrawn || node.closest(":disabled")) continue;
    const [a, b] = [numbers(getComputedStyle(node).color), ground(node)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${node.tagName}.${node.className}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page: Page, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("top_p", exact=True).fill("2")
    ask(page, "not sent")
    page.get_by_label("top_p", exact=True).fill("")
    page.get_by_text("Show routing").click()
    expect(ask(page, "red apple", "Both").locator(".facts")).to_contain_text("tokens/s")
    page.locator(".cell").first.focus()
    assert page.evaluate(CONTRASTS) == []


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_overflows_at_any_width(page: Page, running: Live, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    running.fake.answer = lambda params, index: [
        *byte_ids("w" * 150),
        *(BEGIN, *code_ids(1, 2, 3, 4), END),
    ]
    page.locator("label[for=show-routing]").click()
    answer = ask(page, "x" * 300, "Both")
    expect(answer.locator(".facts")).to_contain_text("156 tokens")
    page.locator(".cell").last.focus()
    expect(page.get_by_role("tooltip")).to_be_visible()
    wide = "document.querySelectorAll('html, body, #chat, #panel')"
    for _ in range(2):
        overflow = f"[...{wide}].map((node) => node.scrollWidth - node.clientWidth)"
        assert page.evaluate(overflow) == [0, 0, 0, 0]
        if width < 1024 and page.locator("#close-panel").is_hidden():
            page.get_by_role("button", name="Settings and gauges").click()
            expect(page.get_by_role("button", name="Close")).to_be_focused()
    if width < 1024:
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Settings and gauges")).to_be_focused()


def test_model_without_pictures_offers_text_only(browser: Browser) -> None:
    fake = FakeAsyncEngine(engine=FakeEngine(processor=processor(has_pixels=False)))
    with live(fake) as running, watched_page(browser, running.url) as page:
        expect(page.locator("#model")).to_have_text("fake")
        expect(page.locator("#mode-image")).to_be_disabled()
        expect(page.locator("#mode-both")).to_be_disabled()
        expect(page.get_by_role("button", name="Attach pictures")).to_be_disabled()
        expect(page.get_by_label("guidance_scale")).to_be_disabled()
        expect(page.locator("#mode-text")).to_be_checked()
        expect(page.get_by_role("button", name="red apple")).to_be_hidden()
        page.get_by_role("button", name="define violin").click()
        expect(page.locator(".answer-body")).to_contain_text(TEXT.strip())


def test_page_works_under_a_path_prefix(browser: Browser) -> None:
    with live(root_path="/llm") as running:
        watch = Watch(f"{running.url}/llm")
        with watched_page(browser, watch.url, watch=watch) as page:
            answer = ask(page, "red apple", "Picture")
            expect(answer.get_by_role("img", name="Picture: red apple")).to_be_visible()
        assert watch.num_asked("/v1/chat/completions") == 1


def test_server_that_is_gone_is_told_and_tried_again(browser: Browser, running: Live) -> None:
    watch = Watch(running.url)
    with watched_page(browser, running.url, watch=watch) as page:
        expect(page.locator("#model")).to_have_text("fake")
        page.route("**/v1/**", lambda route: route.abort())
        answer = ask(page, "hello")
        expect(answer.get_by_role("alert")).to_contain_text("The server cannot be reached.")
        page.unroute("**/v1/**")
        answer.get_by_role("button", name="Try again").click()
        expect(page.locator(".answer-body")).to_contain_text(TEXT.strip())
        lost = [problem for problem in watch.problems if "net::ERR_FAILED" in problem]
        watch.problems = [problem for problem in watch.problems if problem not in lost]
        assert lost


def test_files_are_short_hold_no_inline_code_and_are_all_asked_for_at_once() -> None:
    with live() as running, httpx.Client(base_url=running.url) as client:
        for name in MEDIA_TYPES:
            text = client.get(f"/playground/{name}").text
            assert len(text.splitlines()) <= 500, name
            if name.endswith(".html"):
                assert " style=" not in text and " onclick=" not in text
                assert text.count("<script") == 1
                assert [n for n in MEDIA_TYPES if f'"playground/{n}' not in text] == ["index.html"]
        tag = {"If-None-Match": client.get("/").headers["etag"]}
        assert client.get("/", headers=tag).status_code == 304
