"""The conversation of `momaserve chat`, typed into a terminal and looked at there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from pathlib import Path

import pytest

from momaserve.errors import PromptError, QueueFullError
from momaserve.sampling import OutputMode, SamplingParams
from momaserve_server.chat_terminal import completions
from tests.client.both import DONE, text_chunk
from tests.client.raw_server import (
    EVENT_STREAM,
    JSON,
    LAST_CHUNK,
    Connection,
    chunked,
    raw_server,
)
from tests.server.asgi import TIMEOUT_S
from tests.server.fake_engine import (
    BEGIN,
    END,
    TEXT,
    FakeAsyncEngine,
    byte_ids,
    code_ids,
)
from tests.server.live import Live, live
from tests.server.pseudo_terminal import CTRL_D, PseudoTerminal, terminal
from tests.server.test_media import png

PROMPT = "\n> "
BANNER = "fake at {url}: text and pictures. /help lists the commands."


@pytest.fixture(scope="module")
def running() -> Generator[Live, None, None]:
    with live() as started:
        yield started


@pytest.fixture
def talk(running: Live, tmp_path: Path) -> Generator[PseudoTerminal, None, None]:
    """A conversation, at its first prompt. Answers have text, a picture and a mark."""
    with terminal(["chat", "--url", running.url, "--seed", "0"], directory=tmp_path) as opened:
        opened.until("> ")
        yield opened


def say(talk: PseudoTerminal, text: str) -> None:
    """Types a line and waits for the next prompt."""
    talk.type(text + "\n")
    talk.until(PROMPT)


def lines(talk: PseudoTerminal) -> list[str]:
    return talk.shown().splitlines()


def ended(running: Live) -> None:
    """Waits until the engine has nothing to do any more."""

    async def wait() -> None:
        while running.fake.running:
            running.fake.stopped.clear()
            await running.fake.stopped.wait()

    asyncio.run_coroutine_threadsafe(wait(), running.loop).result(TIMEOUT_S)


def test_an_answer(running: Live, talk: PseudoTerminal, tmp_path: Path) -> None:
    say(talk, "a cat")
    assert lines(talk) == [
        BANNER.format(url=running.url),
        "> a cat",
        f"{TEXT}0",
        *["▀" * 8] * 4,
        "wrote a-cat.png",
        "!",
        ">",
    ]
    # Codes 0, 1, 2 and 3 are greys, in a square; upper halves are written, lower ones behind.
    assert talk.colors(3, 0) == ("000000", "000000")
    assert talk.colors(3, 7) == ("101010", "101010")
    assert talk.colors(6, 0) == ("202020", "202020")
    assert talk.colors(6, 7) == ("303030", "303030")
    assert talk.colors(7, 0) == ("default", "default")
    assert (tmp_path / "a-cat.png").is_file()
    talk.type(CTRL_D)
    assert talk.end() == 0


def test_a_conversation_goes_on(running: Live, talk: PseudoTerminal) -> None:
    say(talk, "/mode text")
    say(talk, "one")
    say(talk, "two")
    messages = [len(byte_ids(said)) + 1 for said in ("one", f"{TEXT}0", "two")]
    assert len(running.fake.submissions[-1].prompt.token_ids) == 1 + sum(messages)
    say(talk, "/reset")
    say(talk, "three")
    assert len(running.fake.submissions[-1].prompt.token_ids) == 1 + len("three") + 1


def test_pictures_grow_in_place(tmp_path: Path) -> None:
    with live() as running:
        running.fake.gate = asyncio.Semaphore(3)  # begin_image and two of four codes
        words = ["chat", "--url", running.url, "--seed", "0", "--modalities", "image"]
        with terminal(words, directory=tmp_path) as talk:
            talk.until("> ")
            talk.type("a cat\n")
            for _ in range(2 * 4):
                talk.until("▀\x1b[0m\r\n")  # two pictures of four lines
            before = lines(talk)
            assert talk.colors(2, 0) == ("000000", "000000")
            assert talk.colors(4, 0) == ("f0f0f0", "f0f0f0")  # not known yet
            for _ in range(10):
                running.call(running.fake.gate.release)
            talk.until(PROMPT)
            assert talk.colors(4, 0) == ("202020", "202020")
            assert lines(talk) == [*before, "wrote a-cat.png", ">"]
            assert before[1:] == ["> a cat", *["▀" * 8] * 4]


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"TERM": "xterm", "COLORTERM": ""}]
)
def test_without_colours_pictures_are_files(
    running: Live, tmp_path: Path, environment: dict[str, str]
) -> None:
    words = ["chat", "--url", running.url, "--seed", "0", "a cat"]
    with terminal(words, directory=tmp_path, environment=environment) as talk:
        assert talk.end() == 0
        assert lines(talk) == [f"{TEXT}0", "wrote a-cat.png", "!"]
        assert b"\x1b" not in talk.written


def test_256_colours_for_one_answer(running: Live, tmp_path: Path) -> None:
    words = ["chat", "--url", running.url, "--seed", "0", "--modalities", "image", "a cat"]
    with terminal(words, directory=tmp_path, environment={"COLORTERM": ""}) as talk:
        assert talk.end() == 0
        assert lines(talk) == [*["▀" * 8] * 4, "wrote a-cat.png"]
        assert talk.written.startswith(b"\x1b[38;5;")
        assert b";2;" not in talk.written


def test_ctrl_c_stops_the_answer_and_then_leaves(tmp_path: Path) -> None:
    with live() as running:
        running.fake.gate = asyncio.Semaphore(2)
        words = ["chat", "--url", running.url, "--seed", "0", "--modalities", "text"]
        with terminal(words, directory=tmp_path) as talk:
            talk.until("> ")
            talk.type("hi\n")
            talk.until(TEXT[:2])
            talk.interrupt()
            talk.until("stopped; Ctrl-C again leaves\r\n> ")
            ended(running)
            assert len(running.fake.aborted) == 1
            for _ in range(20):
                running.call(running.fake.gate.release)
            say(talk, "more")  # what was said before it was stopped counts
            messages = [len(byte_ids(said)) + 1 for said in ("hi", TEXT[:2], "more")]
            assert len(running.fake.submissions[-1].prompt.token_ids) == 1 + sum(messages)
            talk.interrupt()
            talk.until("Ctrl-C again, or Ctrl-D, leaves\r\n> ")
            talk.interrupt()
            assert talk.end() == 130
            assert "Traceback" not in talk.shown()


def test_ctrl_c_during_a_picture_leaves_no_colours_behind(tmp_path: Path) -> None:
    with live() as running:
        running.fake.gate = asyncio.Semaphore(3)
        words = ["chat", "--url", running.url, "--modalities", "image"]
        with terminal(words, directory=tmp_path) as talk:
            talk.until("> ")
            talk.type("hi\n")
            talk.until("▀\x1b[0m\r\n")
            talk.interrupt()
            talk.until("stopped")
            talk.until("> ")
            ended(running)
            talk.type("/quit\n")
            assert talk.end() == 0
            assert list(tmp_path.iterdir()) == []


def test_commands(running: Live, talk: PseudoTerminal, tmp_path: Path) -> None:
    (tmp_path / "in put.png").write_bytes(png())
    (tmp_path / "text.txt").write_text("text")
    for typed, told in (
        ("/help", "Ctrl-C stops an answer; a second one, at the prompt, leaves."),
        ("/nonsense x", "no command /nonsense: /help lists them; a space before it makes it a"),
        ("/mode", "mode is both"),
        ("/mode song", "mode is one of text, image, both"),
        ("/mode image", "mode is image"),
        ("/mode text", "mode is text"),
        ("/image", "error: .: give the path of a file"),
        ("/image none.png", "error: none.png: No such file or directory"),
        ("/image text.txt", "error: text.txt: not a PNG, JPEG, WebP, GIF or BMP file"),
        ("/image 'in put.png'", "a picture goes with your next message"),
        ("/image ~/in put.png", "2 pictures go with your next message"),
        (" /help?", f"{TEXT}0"),
        ("/save talk.json", "wrote talk.json"),
        ("/save talk.json", "error: talk.json: there is a file of that name"),
        ("", ""),
    ):
        say(talk, typed)
        assert told in lines(talk)[-2], typed
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["model"] == "fake"
    question, answer = saved["messages"]
    assert [part["type"] for part in question["content"]] == ["image_url", "image_url", "text"]
    assert question["content"][2]["text"] == "/help?"
    assert answer == {"role": "assistant", "content": f"{TEXT}0"}
    assert running.fake.submissions[-1].params.mode is OutputMode.TEXT
    talk.type("/quit\n")
    assert talk.end() == 0


def test_help_names_every_command(talk: PseudoTerminal) -> None:
    say(talk, "/help")
    shown = talk.shown()
    for name in ("/help", "/reset", "/image PATH", "/mode text|image|both", "/save FILE", "/quit"):
        assert name in shown


def test_history_and_completion(talk: PseudoTerminal, tmp_path: Path) -> None:
    (tmp_path / "picture-of-a-cat.png").write_bytes(png())
    say(talk, "/mode text")
    talk.type("\x1b[A\n")  # the last line again
    talk.until("mode is text")
    talk.until(PROMPT)
    talk.type("/im\t pic\t\n")
    talk.until("a picture goes with your next message")


def test_a_refusal_is_told_and_forgotten(running: Live, talk: PseudoTerminal) -> None:
    say(talk, "/mode text")
    for refusal, told in (
        (QueueFullError("full", retry_after_s=99), "error: full"),
        (PromptError("too long"), "error: too long (/reset starts over)"),
    ):
        running.fake.refusal = refusal
        say(talk, "one")
        running.fake.refusal = None
        assert lines(talk)[-2] == told
    say(talk, "two")
    assert len(running.fake.submissions[-1].prompt.token_ids) == 1 + len("two") + 1


def test_a_terminal_takes_no_orders(tmp_path: Path) -> None:
    def answer(params: SamplingParams, index: int) -> list[int]:
        return [*byte_ids("a\x1b[2J\x07b"), BEGIN, *code_ids(0, 1, 2, 3), END]

    with live(FakeAsyncEngine(answer)) as running:
        words = ["chat", "--url", running.url, "hi"]
        with terminal(words, directory=tmp_path, environment={"NO_COLOR": "1"}) as talk:
            assert talk.end() == 0
            assert lines(talk) == ["a\ufffd[2J\ufffdb", "wrote hi.png"]


MODELS = {"data": [{"id": "raw", "max_model_len": 64, "modalities": ["text"]}]}


def models(connection: Connection) -> None:
    connection.request()
    connection.send(JSON, chunked(json.dumps(MODELS).encode()), LAST_CHUNK)


def test_a_server_that_dies_in_mid_stream(tmp_path: Path) -> None:
    def dies(connection: Connection) -> None:
        connection.request()
        connection.send(EVENT_STREAM, chunked(text_chunk("half of ")), b"1f\r\ndata")

    def lives(connection: Connection) -> None:
        assert b"half of" not in connection.request()
        connection.send(EVENT_STREAM, chunked(text_chunk("all of it") + DONE), LAST_CHUNK)

    with raw_server(models, dies, lives) as server:
        words = ["chat", "--url", server.url]
        with terminal(words, directory=tmp_path, columns=200) as talk:
            talk.until("> ")
            assert lines(talk)[0].startswith("raw at http://127.0.0.1:")
            say(talk, "hi")
            assert lines(talk)[2] == "half of"
            assert lines(talk)[3].startswith("error: the connection broke before the answer was")
            say(talk, "hi")
            assert lines(talk)[-2] == "all of it"
            talk.type(CTRL_D)
            assert talk.end() == 0


def test_no_server(tmp_path: Path) -> None:
    with terminal(["chat", "--url", "http://127.0.0.1:1"], directory=tmp_path) as talk:
        assert talk.end() == 1
        assert talk.shown() == (
            "momaserve chat: error: no server answers at http://127.0.0.1:1: Connection refus\ned"
        )


@pytest.mark.parametrize(
    ("line", "word", "found"),
    [
        ("/", "/", ["/help", "/reset", "/image", "/mode", "/save", "/quit"]),
        ("/s", "/s", ["/save"]),
        ("", "", []),
        ("hel", "hel", []),
        ("/mode ", "", ["text", "image", "both"]),
        ("/mode t", "t", ["text"]),
        ("/image a", "a", ["a file.png", "a*b", "abc/"]),
        ("/image a*", "a*", ["a*b"]),
        ("/save abc/", "abc/", ["abc/x.json"]),
        ("/reset a", "a", []),
        ("what is a", "a", []),
    ],
)
def test_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, word: str, found: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a file.png", "a*b", "b"):
        (tmp_path / name).touch()
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "x.json").touch()
    assert completions(line, word) == found
    monkeypatch.setenv("HOME", str(tmp_path / "abc"))
    assert completions("/image ~/x", "~/x") == [str(tmp_path / "abc" / "x.json")]
