"""`/v1/images/edits`: a picture goes on from its first rows."""

from __future__ import annotations

import base64
import io
import tempfile
from typing import Any

import pytest
from PIL import Image

from momaserve.sampling import OutputMode, SamplingParams
from momaserve_server.routes_edits import first_masked_row
from tests.server.asgi import data_of, http
from tests.server.fake_engine import (
    BEGIN,
    BOS,
    END,
    NUM_TOKENS,
    SEP,
    FakeAsyncEngine,
    FakeEngine,
    byte_ids,
    code_ids,
    processor,
)

pytestmark = pytest.mark.anyio
EDITS = "/v1/images/edits"
GREY = code_ids(5, 5)
"""First row of codes of `picture()`."""


def picture(grey: int = 88, size: tuple[int, int] = (8, 8)) -> bytes:
    return _file(Image.new("L", size, grey))


def mask(first_row: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """Transparent from a row of pixels on."""
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, first_row, *size))
    return _file(image)


def _file(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def rest(params: SamplingParams, index: int) -> list[int]:
    """What a model answers to a picture with its first row."""
    return [*code_ids(1 + index, 2), END]


async def edit(
    fake: FakeAsyncEngine | None = None,
    files: dict[str, bytes] | None = None,
    **fields: str,
) -> Any:
    async with http(fake or FakeAsyncEngine(rest)) as client:
        return await client.post(
            EDITS,
            data={"prompt": "ab", **fields},
            files={"image": picture()} if files is None else files,
        )


async def test_the_first_half_is_kept() -> None:
    fake = FakeAsyncEngine(rest)
    response = await edit(fake)
    assert response.status_code == 200, response.text
    submission = fake.submissions[0]
    assert submission.prompt.token_ids == (BOS, *byte_ids("ab"), SEP, BEGIN, *GREY)
    assert submission.params.mode is OutputMode.IMAGE
    assert response.json()["usage"] == {
        "input_tokens": 7,
        "output_tokens": 2,
        "total_tokens": 9,
        "input_tokens_details": {"text_tokens": 5, "image_tokens": 2, "cached_tokens": 0},
    }


async def test_the_whole_picture_comes_back() -> None:
    response = await edit(n="2")
    greys = []
    for item in response.json()["data"]:
        image = Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).convert("L")
        greys.append(list(image.resize((2, 2), Image.Resampling.NEAREST).tobytes()))
    assert greys == [[80, 80, 16, 32], [80, 80, 32, 32]]


async def test_a_stream_has_openais_event_names() -> None:
    response = await edit(stream="true", partial_images="3")
    names = [line for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == ["event: image_edit.partial_image", "event: image_edit.completed"]
    data = data_of(response.text)
    assert data[-1]["type"] == "image_edit.completed"
    assert data[-1]["usage"]["output_tokens"] == NUM_TOKENS


@pytest.mark.parametrize(("keep_rows", "kept"), [("0", []), ("1", GREY)])
async def test_keep_rows(keep_rows: str, kept: list[int]) -> None:
    fake = FakeAsyncEngine(rest)
    await edit(fake, keep_rows=keep_rows)
    assert fake.submissions[0].prompt.token_ids[4:] == (BEGIN, *kept)


@pytest.mark.parametrize(("first_row", "kept"), [(0, []), (3, []), (4, GREY), (7, GREY)])
async def test_a_mask_says_where_the_new_begins(first_row: int, kept: list[int]) -> None:
    fake = FakeAsyncEngine(rest)
    response = await edit(fake, {"image": picture(), "mask": mask(first_row)})
    assert response.status_code == 200, response.text
    assert fake.submissions[0].prompt.token_ids[4:] == (BEGIN, *kept)


def test_a_mask_lies_on_its_picture_as_that_lies_in_its_square() -> None:
    tall = Image.open(io.BytesIO(mask(50, (50, 100))))
    assert first_masked_row(tall, (50, 100), 64) == 32
    wide = Image.open(io.BytesIO(mask(25, (100, 50))))  # 16 rows of white, 32 of picture
    assert first_masked_row(wide, (100, 50), 64) == 32


async def test_every_field_reaches_the_engine() -> None:
    fake = FakeAsyncEngine(rest)
    await edit(
        fake,
        n="2",
        seed="3",
        image_temperature="0.5",
        guidance_scale="2",
        priority="-1",
        size="8x8",
        user="me",
        quality="high",
        input_fidelity="low",
    )
    params = fake.submissions[0].params
    assert (params.n, params.seed, params.guidance_scale, params.priority) == (2, 3, 2.0, -1)
    assert params.image.temperature == 0.5


@pytest.mark.parametrize(
    ("files", "fields", "param", "code"),
    [
        ({"mask": mask(4)}, {}, "image", "missing_field"),
        ({"image": b"no picture"}, {}, "image", "invalid_prompt"),
        ({"image": picture(), "mask": b"no picture"}, {}, "mask", "invalid_prompt"),
        ({"image": picture(), "mask": picture()}, {}, "mask", "invalid_value"),
        ({"image": picture(), "mask": mask(4, (9, 9))}, {}, "mask", "invalid_value"),
        ({"image": picture(), "other": picture()}, {}, "other", "unknown_field"),
        (None, {"keep_rows": "2"}, "keep_rows", "invalid_value"),
        (None, {"keep_rows": "-1"}, "keep_rows", "invalid_value"),
        (None, {"keep_rows": "one"}, "keep_rows", "invalid_value"),
        (None, {"n": "1.5"}, "n", "invalid_value"),
        (None, {"n": "17"}, "n", "invalid_value"),
        (None, {"prompt": ""}, "prompt", "invalid_value"),
        (None, {"size": "1024x1024"}, "size", "invalid_value"),
        (None, {"zzz": "1"}, "zzz", "unknown_field"),
        ({"mask": mask(4)}, {"image": "a string"}, "image", "invalid_value"),
        (None, {"partial_images": "2"}, None, "invalid_value"),
    ],
)
async def test_bad_forms(
    files: dict[str, bytes] | None, fields: dict[str, str], param: str | None, code: str
) -> None:
    async with http(FakeAsyncEngine(rest)) as client:
        response = await client.post(
            EDITS,
            data={"prompt": "ab", **fields},
            files={"image": picture()} if files is None else files,
        )
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error


async def test_a_field_twice_is_refused() -> None:
    async with http() as client:
        files = [("image", picture()), ("image[]", picture())]
        response = await client.post(EDITS, data={"prompt": "ab"}, files=files)
    assert response.json()["error"]["param"] == "image"


async def test_openais_list_of_one_picture_is_taken() -> None:
    fake = FakeAsyncEngine(rest)
    response = await edit(fake, {"image[]": picture()})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "code"),
    [
        ("application/json", "unsupported_media_type"),
        ("multipart/form-data", "invalid_form"),
        ("multipart/form-data; boundary=x", "invalid_form"),
        ("multipart/form-data; boundary=", "invalid_form"),
    ],
)
async def test_what_is_no_form(content_type: str, code: str) -> None:
    async with http() as client:
        response = await client.post(
            EDITS, content=b'{"prompt": "ab"}', headers={"Content-Type": content_type}
        )
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


async def test_a_form_that_is_too_long() -> None:
    async with http(max_body_bytes=1000) as client:
        noise = bytes(range(256)) * 5
        response = await client.post(EDITS, data={"prompt": "ab"}, files={"image": noise})
        assert response.status_code == 413
        response = await client.post(EDITS, data={"prompt": "ab"}, files={"image": picture()})
        assert response.status_code == 200


async def test_a_field_that_is_too_long() -> None:
    response = await edit(prompt="a" * (1 << 21))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_form")


async def test_a_large_picture_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's file system may be read-only."""

    def refuse(*args: Any, **fields: Any) -> Any:
        raise OSError("read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    noisy = Image.effect_noise((1500, 1500), 100)
    assert len(_file(noisy)) > 1 << 20
    response = await edit(None, {"image": _file(noisy)})
    assert response.status_code == 200, response.text


async def test_without_pixels_there_is_nothing_to_edit() -> None:
    engine = FakeEngine(processor=processor(has_pixels=False))
    response = await edit(FakeAsyncEngine(rest, engine))
    assert response.status_code == 400
