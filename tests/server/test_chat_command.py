"""`momaserve chat` for one answer: what goes where, and how it ends."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from momaserve.errors import PromptError, QueueFullError
from momaserve.outputs import FinishReason
from momaserve_client import Client, Options
from momaserve_server import chat, chat_session, cli
from momaserve_server.chat_files import (
    FileError,
    read_picture,
    save_conversation,
    save_new,
    stem_of,
)
from momaserve_server.chat_options import FIELDS
from momaserve_server.chat_session import Conversation
from tests.client.raw_server import JSON, LAST_CHUNK, Connection, chunked, raw_server
from tests.server.fake_engine import TEXT, FakeAsyncEngine, FakeEngine, processor
from tests.server.live import Live, live
from tests.server.pseudo_terminal import hear_interrupts, interrupt_when_waiting
from tests.server.test_media import png

NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def running() -> Generator[Live, None, None]:
    with live() as started:
        yield started


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test writes its pictures into a place of its own, and has no key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOMASERVE_API_KEY", raising=False)
    return tmp_path


def ask(url: str, *words: str) -> int:
    try:
        return cli.main(["chat", "--url", url, *words])
    except SystemExit as end:  # argparse's own way
        return int(str(end.code))


Shown = pytest.CaptureFixture[str]


def test_text_to_stdout(running: Live, capsys: Shown) -> None:
    assert ask(running.url, "hi", "--seed", "5", "--modalities", "text") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{TEXT}5\n", "")


def test_pictures_to_files(running: Live, capsys: Shown, directory: Path) -> None:
    """By default an answer may hold all that the model can make."""
    for _ in range(2):
        assert ask(running.url, "A red apple!", "--seed", "5") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}5\n!\n" * 2
    assert shown.err == "wrote a-red-apple.png\nwrote a-red-apple-2.png\n"
    assert sorted(os.listdir(directory)) == ["a-red-apple-2.png", "a-red-apple.png"]
    with Client(running.url) as client:
        whole = client.generate_images("A red apple!", seed=5).images[0]
    assert (directory / "a-red-apple.png").read_bytes() == whole


def test_out_is_made(running: Live, capsys: Shown, directory: Path) -> None:
    assert ask(running.url, "x", "--modalities", "image", "--out", "new/pics") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "wrote new/pics/x.png\n")
    assert Image.open(directory / "new" / "pics" / "x.png").size == (8, 8)


def test_everything_reaches_the_server(running: Live, directory: Path) -> None:
    (directory / "in.png").write_bytes(png())
    words = ["--model", "fake", "--image", "in.png", "--image", "in.png", "--system", "be brief"]
    words += ["--stop", "!", "--stop", "?", "--routing", "calibrated", "--timeout-s", "60"]
    given = {
        "seed": 7,
        "max_tokens": 9,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.125,
        "image_temperature": 0.75,
        "image_top_k": 4,
        "image_top_p": 0.5,
        "guidance_scale": 1.5,
        "repetition_penalty": 1.25,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "timeout_s": 60.0,
    }
    assert set(given) == {field.name for field in FIELDS} <= set(Options.__annotations__)
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    assert ask(running.url, "what?", *words) == 0
    submission = running.fake.submissions[-1]
    params = submission.params
    for name in ("seed", "max_tokens", "min_tokens", "repetition_penalty", "presence_penalty"):
        assert getattr(params, name) == given[name]
    assert (params.text.temperature, params.text.min_p) == (0.5, 0.125)
    assert (params.image.temperature, params.image.top_k) == (0.75, 4)
    assert (params.guidance_scale, params.timeout_s) == (1.5, 60.0)
    assert params.stop == ("!", "?")
    assert str(params.routing) == "calibrated"
    text = processor().text
    assert text is not None
    assert text.decode(submission.prompt.token_ids) == "be briefwhat?"
    assert len(submission.prompt.token_ids) == 1 + (8 + 1) + (2 * 6 + 5 + 1)


def test_stdin_is_the_prompt(
    running: Live, capsys: Shown, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert ask(running.url) == 0
    assert capsys.readouterr().err == "wrote two-lines.png\n"
    (directory / "in.png").write_bytes(png())
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert ask(running.url, "--image", "in.png") == 0  # a picture alone is a question
    assert capsys.readouterr().err == "wrote picture.png\n"


def test_a_model_without_pixels_is_asked_for_text(capsys: Shown) -> None:
    blind = FakeAsyncEngine(engine=FakeEngine(processor=processor(has_pixels=False)))
    with live(blind) as running:
        assert ask(running.url, "hi", "--seed", "5") == 0
        assert capsys.readouterr().out == f"{TEXT}5\n"
        assert ask(running.url, "hi", "--modalities", "image") == 2
    assert "image_tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["hi", "--modalities", "song"], 2, "'song' is not text, image or text,image"),
        (["hi", "--seed", "x"], 2, "--seed"),
        (["hi", "--nonsense"], 2, "--nonsense"),
        (["hi", "--temperature", "-1"], 2, "temperature"),
        (["hi", "--top-p", "0"], 2, "top_p"),
        (["hi", "--url", "foo"], 2, "--url must be like 'http://host:port', got 'foo'"),
        (["hi", "--api-key", "a b"], 2, "an API key is printable ASCII"),
        ([""], 2, "the prompt is empty"),
        ([" \n"], 2, "the prompt is empty"),
        (["\udcff"], 2, "not UTF-8"),
        (["hi", "--system", "\udcff"], 2, "not UTF-8"),
        (["hi", "--model", "gpt"], 1, "'gpt' is not served there; there is 'fake'"),
        (["hi", "--url", NOBODY], 1, f"no server answers at {NOBODY}: Connection refused"),
        (["hi", "--image", "none.png"], 1, "none.png: No such file or directory"),
        (["hi", "--image", "."], 1, "Is a directory"),
        (["hi", "--image", "text.txt"], 1, "text.txt: not a PNG, JPEG, WebP, GIF or BMP file"),
        (["hi", "--image", "fake.png"], 1, "picture"),
        (["hi", "--out", "text.txt"], 1, "text.txt: File exists"),
    ],
)
def test_mistakes_are_one_line(
    running: Live, capsys: Shown, directory: Path, words: list[str], code: int, told: str
) -> None:
    (directory / "text.txt").write_text("text")
    (directory / "fake.png").write_bytes(png()[:20])
    assert ask(running.url, *words) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.splitlines()[-1]
    assert last.startswith("momaserve chat: error: ")
    assert told in last


def test_no_server_at_the_default_address(capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "DEFAULT_URL", NOBODY)
    assert cli.main(["chat", "hi"]) == 1
    assert capsys.readouterr().err == (
        f"momaserve chat: error: no server answers at {NOBODY}: start one with 'momaserve serve', "
        "or give --url\n"
    )


def test_something_else_at_the_address(capsys: Shown) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(JSON, chunked(b"<html>"), LAST_CHUNK)

    with raw_server(script) as server:
        assert ask(server.url, "hi") == 1
    assert "does not answer like a momaserve server" in capsys.readouterr().err


def test_keys(capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(api_keys=("secret",)) as running:
        assert ask(running.url, "hi") == 1
        assert "MOMASERVE_API_KEY" in capsys.readouterr().err
        assert ask(running.url, "hi", "--api-key", "secret") == 0
        for value in ("secret", "secret, another"):  # several, as the server's own has them
            monkeypatch.setenv("MOMASERVE_API_KEY", value)
            assert ask(running.url, "hi") == 0


@pytest.mark.parametrize(
    ("refusal", "code"),
    [(PromptError("no"), 1), (QueueFullError("full", retry_after_s=99), 1)],
)
def test_refusals(running: Live, capsys: Shown, refusal: Exception, code: int) -> None:
    running.fake.refusal = refusal
    try:
        assert ask(running.url, "hi") == code
    finally:
        running.fake.refusal = None
    assert capsys.readouterr().err == f"momaserve chat: error: {refusal}\n"


def test_a_busy_server_is_asked_again(
    running: Live, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        running.fake.refusal = None

    monkeypatch.setattr("momaserve_server.chat.sleep", sleep)
    running.fake.refusal = QueueFullError("full", retry_after_s=3)
    assert ask(running.url, "hi", "--modalities", "text", "--seed", "5") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}5\n"
    assert shown.err == "the server is busy: trying again in 3 s\n"
    assert len(waits) == 1


def test_errors_give_no_orders_to_the_terminal(running: Live, capsys: Shown) -> None:
    running.fake.refusal = PromptError("a\x1b[2Jb\nc")
    try:
        assert ask(running.url, "hi") == 1
    finally:
        running.fake.refusal = None
    assert capsys.readouterr().err == "momaserve chat: error: a\ufffd[2Jb c\n"


def test_an_answer_that_fails_half_way(capsys: Shown) -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, FinishReason.ERROR)
    with live(fake) as running:
        assert ask(running.url, "hi") == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{TEXT[:2]}\n", "momaserve chat: error: out of luck\n")


@pytest.mark.parametrize(
    ("num_tokens", "code", "out", "told"),
    [
        (0, 1, "", "momaserve chat: error: timeout_s passed before the answer began"),
        (2, 0, f"{TEXT[:2]}\n", "the answer is cut off: its time was over"),
    ],
)
def test_an_answer_whose_time_is_over(
    capsys: Shown, num_tokens: int, code: int, out: str, told: str
) -> None:
    fake = FakeAsyncEngine()
    fake.failure = (num_tokens, FinishReason.TIMEOUT)
    with live(fake) as running:
        assert ask(running.url, "hi", "--timeout-s", "1") == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (out, f"{told}\n")


def test_an_answer_that_is_cut_off(running: Live, capsys: Shown) -> None:
    assert ask(running.url, "hi", "--max-tokens", "2") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT[:2]}\n"
    assert shown.err == "the answer is cut off: it reached its longest length\n"


def test_a_picture_that_cannot_be_written(
    running: Live, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: bytes, directory: Path, stem: str) -> Path:
        raise FileError(directory / stem, OSError(28, "No space left on device"))

    monkeypatch.setattr(chat_session, "save_new", fail)
    assert ask(running.url, "hi", "--seed", "5") == 1
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}5\n!\n"  # the rest of the answer is still wanted
    assert shown.err == "error: hi: No space left on device\n"


def spawn(*words: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "momaserve_server", "chat", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        env=environment,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=hear_interrupts,
        **options,
    )


def test_a_reader_that_has_enough(running: Live) -> None:
    process = spawn("--url", running.url, "hi")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1


def test_an_interrupt_stops_the_server_too() -> None:
    with live() as running:
        running.fake.gate = asyncio.Semaphore(3)
        process = spawn("--url", running.url, "hi")
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == TEXT[0]
        interrupt_when_waiting(process.pid, lambda: process.send_signal(signal.SIGINT))
        assert process.stderr.read() == ""
        assert process.wait(30) == 130


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_help_is_light_and_chat_needs_no_torch() -> None:
    heavy = ("torch", "fastapi", "uvicorn", "pydantic", "numpy")
    done = python(
        "import sys\nfrom momaserve_server.cli import main\n"
        "try:\n    main(['chat', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"light = ('httpx', 'PIL', 'momaserve_client', *{heavy!r})\n"
        "print([m for m in light if m in sys.modules])\n"
        "import momaserve_server.chat\n"
        f"print([m for m in {heavy!r} if m in sys.modules])\n"
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"]


def test_without_the_client_one_line_says_what_to_do() -> None:
    done = python(
        "import sys\nsys.modules['momaserve_client'] = None\n"
        "from momaserve_server.cli import main\nsys.exit(main(['chat', 'hi']))\n"
    )
    assert done.returncode == 1
    assert done.stderr == (
        "momaserve chat: error: the package momaserve-client is missing: "
        "pip install momaserve-client\n"
    )


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("red apple", "red-apple"),
        ("  A *red* apple, please!\n", "a-red-apple-please"),
        ("../../etc/passwd", "etc-passwd"),
        (".hidden", "hidden"),
        ("Äpfel", "äpfel"),
        ("\x1b[2J", "2j"),
        ("", "picture"),
        ("?!", "picture"),
        ("x" * 100, "x" * 40),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_names_of_pictures(prompt: str, stem: str) -> None:
    assert stem_of(prompt) == stem


def test_no_file_is_overwritten(directory: Path) -> None:
    (directory / "a.png").write_text("mine")
    (directory / "a-2.png").symlink_to(directory / "nowhere")
    (directory / "a-3.png").mkdir()
    assert save_new(b"new", directory, "a") == directory / "a-4.png"
    assert save_new(b"newer", directory, "a") == directory / "a-5.png"
    assert (directory / "a.png").read_text() == "mine"
    assert (directory / "a-4.png").read_bytes() == b"new"
    assert not (directory / "nowhere").exists()
    save_conversation({"messages": ["ä"]}, directory / "talk.json")
    assert re.search("ä", (directory / "talk.json").read_text(encoding="utf-8"))
    with pytest.raises(FileError, match=r"talk\.json: there is a file of that name"):
        save_conversation({}, directory / "talk.json")
    assert len(os.listdir(directory)) == 6  # and nothing is left behind


def test_files_that_cannot_be_written(directory: Path) -> None:
    with pytest.raises(FileError, match="No such file or directory"):
        save_new(b"new", directory / "none", "a")
    with pytest.raises(FileError, match="No such file or directory"):
        save_conversation({}, directory / "none" / "talk.json")


def test_nothing_is_left_of_a_file_that_failed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(FileError, match=r"a\.png: No space left"):
        save_new(b"new", directory, "a")
    with pytest.raises(FileError, match=r"talk\.json: No space left"):
        save_conversation({}, directory / "talk.json")
    assert os.listdir(directory) == []


def test_files_that_are_no_pictures(directory: Path) -> None:
    (directory / "large").write_bytes(b"x" * 11)
    with pytest.raises(FileError, match="at most 10 bytes"):
        read_picture(directory / "large", 10)
    with pytest.raises(FileError, match="at most 10 bytes"):
        read_picture(Path("/dev/zero"), 10)
    assert read_picture(directory / "large", 11) == b"x" * 11
    with pytest.raises(FileError, match="null"):
        read_picture(Path("a\0b"), 10)


def test_conversations() -> None:
    conversation = Conversation("be brief")
    conversation.pictures.append(png())
    question = conversation.question("what?")
    assert [part["type"] for part in question["content"]] == ["image_url", "text"]
    conversation.add(question, ["a", "b"])
    assert conversation.messages() == [
        {"role": "system", "content": "be brief"},
        question,
        {"role": "assistant", "content": "ab"},
    ]
    assert conversation.question("more") == {"role": "user", "content": "more"}
    conversation.forget()
    assert conversation.messages() == [{"role": "system", "content": "be brief"}]
    with pytest.raises(PromptError, match="UTF-8"):
        conversation.question("\udcff")
