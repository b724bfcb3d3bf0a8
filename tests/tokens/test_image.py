"""Pictures: every kind of file, every kind of bad file, and the codec."""

import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from momaserve.errors import CheckpointError, PromptError
from momaserve.models.config import ImageConfig
from momaserve.tokens.image import ImageCodec, ImageLimits, fit_square, open_image
from tests.tokens.builders import (
    FIRST,
    IMAGE_CONFIG,
    NUM_CODES,
    NUM_TOKENS,
    VOCAB_SIZE,
    codec_model,
    write_codec,
)

LIMITS = ImageLimits(max_bytes=200_000, max_pixels=64 * 64, min_side=2)
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def near(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= 12 for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_kinds_of_files(kind: str) -> None:
    image = open_image(file_of(Image.new("RGB", (20, 10), RED), kind), LIMITS)
    assert image.size == (20, 10)
    square = fit_square(image, 8)
    assert near(square, (4, 4), RED)
    assert near(square, (4, 0), WHITE)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PDF", "JPEG2000", "EPS"])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(PromptError, match="broken or not a PNG"):
        open_image(file_of(Image.new("RGB", (16, 16)), kind), LIMITS)


def test_limits_are_in_the_message() -> None:
    small = file_of(Image.new("RGB", (8, 8)))
    with pytest.raises(PromptError, match=f"at most 10 bytes, got {len(small)}"):
        open_image(small, ImageLimits(max_bytes=10))
    with pytest.raises(PromptError, match="at most 63 pixels, got 8 x 8"):
        open_image(small, ImageLimits(max_pixels=63))
    with pytest.raises(PromptError, match="at least 9 pixels on each side, got 8 x 8"):
        open_image(small, ImageLimits(min_side=9))
    assert open_image(small, ImageLimits(max_bytes=len(small), max_pixels=64, min_side=8))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    with pytest.raises(PromptError, match="at least 2 pixels"):
        open_image(file_of(Image.new("RGB", size)), LIMITS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 10_000), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_by_their_header(width: int, height: int) -> None:
    with pytest.raises(PromptError, match=f"at most 4096 pixels, got {width} x {height}"):
        open_image(png_claiming(width, height), LIMITS)


@pytest.mark.filterwarnings("error")
def test_bombs_of_other_kinds() -> None:
    gif = bytearray(file_of(Image.new("L", (8, 8)), "GIF"))
    struct.pack_into("<HH", gif, 6, 65535, 65535)
    bmp = bytearray(file_of(Image.new("RGB", (8, 8)), "BMP"))
    struct.pack_into("<ii", bmp, 18, 60_000, 60_000)
    webp = bytearray(file_of(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", lossless=False))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\x00\xff\x3f\x00"
    jpeg = bytearray(file_of(Image.new("L", (8, 8)), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpeg, start + 5, 65000, 65000)
    for data in (gif, bmp, webp, jpeg):
        with pytest.raises(PromptError):
            open_image(bytes(data), LIMITS)


def test_jpeg_with_very_many_scans() -> None:
    data = file_of(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    assert open_image(data, LIMITS).size == (16, 16)
    start = data.rindex(b"\xff\xda")
    with pytest.raises(PromptError, match="at most 40 scans"):
        open_image(data[:start] + data[start:-2] * 200 + data[-2:], LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0",
        b"RIFF\x00\x00\x00\x00WEBP",
        b"GIF89a",
        b"BM",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"P6 8 8 255 " + bytes(192),
        png_claiming(8, 8)[:40],
        png_claiming(0, 8),
    ],
)
def test_broken_files(data: bytes) -> None:
    with pytest.raises(PromptError) as caught:
        open_image(data, LIMITS)
    assert caught.value.param == "image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@given(data=st.data())
def test_damaged_files_give_a_picture_or_a_prompt_error(kind: str, data: st.DataObject) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    content = bytearray(file_of(Image.fromarray(noise), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        image = open_image(bytes(content[:cut]), LIMITS)
        assert fit_square(image, 8).size == (8, 8)
    except PromptError as error:
        assert "Error" not in str(error)  # nothing of the decoder's own words


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, GREEN)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=9)
        assert near(fit_square(open_image(data, LIMITS), 8), (4, 4), RED)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert near(fit_square(open_image(file_of(clear), LIMITS), 8), (4, 4), WHITE)
    assert near(fit_square(open_image(file_of(half), LIMITS), 8), (4, 4), (255, 127, 127))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for kind in ("PNG", "GIF"):
        shown = open_image(file_of(palette, kind, transparency=0), LIMITS)
        assert near(fit_square(shown, 8), (4, 4), GREEN)
        hidden = open_image(file_of(palette, kind, transparency=1), LIMITS)
        assert near(fit_square(hidden, 8), (4, 4), WHITE)
    by_entry = open_image(file_of(palette, "PNG", transparency=b"\xff\x80"), LIMITS)
    assert near(fit_square(by_entry, 8), (4, 4), (127, 255, 127))
    by_colour = open_image(file_of(Image.new("RGB", (8, 8), RED), transparency=RED), LIMITS)
    assert near(fit_square(by_colour, 8), (4, 4), WHITE)
    grey = open_image(file_of(Image.new("L", (8, 8), 7), transparency=7), LIMITS)
    assert near(fit_square(grey, 8), (4, 4), WHITE)


def test_sixteen_bits() -> None:
    grey = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    image = open_image(file_of(grey), LIMITS)
    assert image.mode.startswith("I;16")
    assert near(fit_square(image, 8), (4, 4), (128, 128, 128))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    row = b"\x00" + struct.pack(">HHH", 0xFFFF, 0x8000, 0) * 8
    colour = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
        + png_chunk(b"IDAT", zlib.compress(row * 8))
        + png_chunk(b"IEND", b"")
    )
    assert near(fit_square(open_image(colour, LIMITS), 8), (4, 4), (255, 128, 0))


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("1", (8, 8), 1), WHITE),
        (Image.new("L", (8, 8), 9), (9, 9, 9)),
        (Image.new("LA", (8, 8), (0, 0)), WHITE),
        (Image.new("RGB", (8, 8), RED), RED),
        (Image.new("RGB", (8, 8), RED).convert("P"), RED),
        (Image.new("RGBA", (8, 8), (*RED, 0)).convert("PA"), WHITE),
        (Image.new("RGB", (8, 8), RED).convert("CMYK"), RED),
        (Image.new("RGB", (8, 8), RED).convert("YCbCr"), RED),
        (Image.new("RGB", (8, 8), RED).convert("HSV"), RED),
        (Image.new("LAB", (8, 8), (255, 128, 128)), WHITE),
        (Image.new("RGBA", (8, 8), (*RED, 0)).convert("RGBa"), WHITE),
        (Image.new("LA", (8, 8), (0, 0)).convert("La"), WHITE),
        (Image.new("I", (8, 8), 200), (200, 200, 200)),
        (Image.new("I", (8, 8), 200 * 256), (200, 200, 200)),
        (Image.new("I;16", (8, 8), 200 * 256), (200, 200, 200)),
        (Image.new("I;16B", (8, 8), 200 * 256), (200, 200, 200)),
        (Image.new("F", (8, 8), 200.0), (200, 200, 200)),
        (Image.new("F", (8, 8), float("nan")), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode(image: Image.Image, colour: tuple[int, int, int]) -> None:
    square = fit_square(image, 8)
    assert square.mode == "RGB"
    assert near(square, (4, 4), colour)


def test_cmyk_file() -> None:
    data = file_of(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG")
    image = open_image(data, LIMITS)
    assert image.mode == "CMYK"
    assert near(fit_square(image, 8), (4, 4), RED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """A picture that stands upright with its left half red, stored turned in each way."""
    upright = Image.new("RGB", (16, 16), GREEN)
    upright.paste(RED, (0, 0, 8, 16))
    upright.paste((0, 0, 255), (0, 0, 8, 8))
    turns = Image.Transpose
    inverse = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(inverse[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP", "JPEG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        image = open_image(file_of(stored, kind, exif=exif, **options), LIMITS)
        square = fit_square(image, 16)
        assert near(square, (3, 3), (0, 0, 255))
        assert near(square, (3, 12), RED)
        assert near(square, (12, 3), GREEN)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored() -> None:
    for exif in (b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00", b"x" * 50):
        data = file_of(Image.new("RGB", (8, 8), RED), "JPEG", exif=exif)
        assert near(fit_square(open_image(data, LIMITS), 8), (4, 4), RED)


@pytest.mark.parametrize(
    ("size", "corner", "expected"),
    [
        ((1, 1), (0, 0), RED),
        ((1000, 1), (4, 0), WHITE),
        ((1, 1000), (0, 4), WHITE),
        ((16, 8), (4, 1), WHITE),
        ((8, 16), (6, 4), WHITE),
        ((100, 100), (0, 0), RED),
    ],
)
def test_aspect_ratio_is_kept(
    size: tuple[int, int], corner: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    square = fit_square(Image.new("RGB", size, RED), 8)
    assert square.size == (8, 8)
    assert near(square, (4, 4), RED) or near(square, (3, 3), RED)
    assert near(square, corner, expected)


def test_a_picture_without_pixels() -> None:
    with pytest.raises(PromptError, match="got 0 x 5"):
        fit_square(Image.new("RGB", (0, 5)), 8)


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec(codec_model(), IMAGE_CONFIG)


def noise_picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def test_codec_agrees_with_the_model(codec: ImageCodec) -> None:
    image, model = noise_picture(), codec_model().eval()
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    codes = model.encode(pixels)
    ids = codec.encode(image)
    assert ids == tuple((codes[0] + FIRST).tolist())
    expected = ((model.decode(codes)[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
    decoded = codec.decode(ids)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.array(decoded), expected.numpy())


def test_partial_pictures_are_filled_with_white(codec: ImageCodec) -> None:
    ids = codec.encode(noise_picture())
    white = codec.encode(Image.new("RGB", (8, 8), WHITE))
    for i in range(NUM_TOKENS + 1):
        assert codec.decode_partial(ids[:i]) == codec.decode(ids[:i] + white[i:])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "has 4 image ids, got 0"),
        ([FIRST] * 5, "got 5"),
        ([FIRST] * 3 + [FIRST - 1], "from 400 to 415, got 399"),
        ([FIRST] * 3 + [VOCAB_SIZE], "got 416"),
        ([FIRST] * 3 + [True], "got True"),
        ([FIRST] * 3 + [-1], "got -1"),
    ],
)
def test_decode_refuses_what_is_no_picture(codec: ImageCodec, ids: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        codec.decode(ids)


def test_too_many_ids_for_a_part(codec: ImageCodec) -> None:
    with pytest.raises(PromptError, match="got 5"):
        codec.decode_partial([FIRST] * 5)


def test_threads_share_a_codec(codec: ImageCodec) -> None:
    pictures = [noise_picture(seed) for seed in range(16)]
    expected = [codec.decode(codec.encode(picture)) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(codec.encode, pictures))
        assert list(pool.map(codec.decode, ids)) == expected
    assert not codec._model.training
    assert all(not parameter.requires_grad for parameter in codec._model.parameters())


def test_load(tmp_path: Path, codec: ImageCodec) -> None:
    directory = tmp_path / "image_tokenizer"
    write_codec(directory)
    loaded = ImageCodec.load(directory, IMAGE_CONFIG)
    assert loaded.encode(noise_picture()) == codec.encode(noise_picture())


def test_load_half_precision(tmp_path: Path) -> None:
    directory = tmp_path / "image_tokenizer"
    write_codec(directory)
    path = directory / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path)
    codec = ImageCodec.load(directory, IMAGE_CONFIG)
    assert {p.dtype for p in codec._model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.1.weight"), "missing tensors: encoder.1.weight$"),
        (lambda t: t.update(x=torch.zeros(1)), "unknown tensors: x$"),
        (
            lambda t: t.update({"encoder.1.bias": torch.zeros(7)}),
            r"misshaped tensors: encoder.1.bias \[7\] instead of \[4\]$",
        ),
        (lambda t: t.clear(), "missing tensors: .* and [0-9]+ more$"),
    ],
)
def test_load_is_strict(tmp_path: Path, change: object, message: str) -> None:
    directory = tmp_path / "image_tokenizer"
    write_codec(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    assert callable(change)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        ImageCodec.load(directory, IMAGE_CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": [4, 5]}, "20 codes"),
        ({"image_size": 16}, r"grid of \(4, 4\)"),
        ({"surprise": 1}, "unknown keys"),
        ({"image_size": "8"}, "image_size must be a positive integer"),
        ({"levels": None}, "levels must be"),
        ({"encoder_channels": [], "decoder_channels": []}, "encoder_channels must be"),
        ({"decoder_channels": [4, 0]}, "decoder_channels must be"),
        ({"model_type": "pickle"}, "model_type must be 'fsq'"),
    ],
)
def test_codec_configuration(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    directory = tmp_path / "image_tokenizer"
    write_codec(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        ImageCodec.load(directory, IMAGE_CONFIG)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"rubbish", b"\x08" + bytes(7) + b"{}      "])
def test_codec_files_missing_or_broken(tmp_path: Path, name: str, content: bytes | None) -> None:
    directory = tmp_path / "image_tokenizer"
    write_codec(directory)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        ImageCodec.load(directory, IMAGE_CONFIG)


def test_a_codec_of_another_checkpoint() -> None:
    other = ImageConfig(
        first_token_id=0,
        num_codes=NUM_CODES,
        tokens_per_image=4,
        grid=(1, 4),
        begin_token_id=17,
        end_token_id=18,
    )
    with pytest.raises(CheckpointError, match="grid of"):
        ImageCodec(codec_model(), other)
