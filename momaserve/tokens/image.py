"""Pictures: bytes from a stranger -> PIL image -> image token ids, and back.

Everything here may be called from any thread. A decoder's own error text is never passed on.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)
from safetensors.torch import load_file

from momaserve.errors import CheckpointError, PromptError
from momaserve.models.config import ImageConfig, read_json_object
from momaserve.models.image_tokenizer import ImageAutoencoder, ImageTokenizerConfig

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture with this EXIF orientation must be turned to stand upright."""

_JPEG, _JPEG_SCAN = b"\xff\xd8\xff", b"\xff\xda"
_MAX_JPEG_SCANS = 40
"""Each scan of a progressive JPEG passes over the whole picture; real ones have about ten."""

_UNREADABLE = "the picture is broken or not a PNG, JPEG, WebP, GIF or BMP"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What a picture in a request may be; checked before its pixels are decoded."""

    max_bytes: int = 10 * 1024 * 1024
    """Size of the file."""
    max_pixels: int = 4096 * 4096
    """Width times height."""
    min_side: int = 4
    """Pixels along the shorter side."""


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decode a PNG, JPEG, WebP, GIF (first frame) or BMP file.

    Raises:
        PromptError: the file is too large, has too many or too few pixels, is of another kind
            or is broken.
    """
    if len(data) > limits.max_bytes:
        raise PromptError(
            f"a picture may have at most {limits.max_bytes} bytes, got {len(data)}", param="image"
        )
    try:
        image = _open_header(data)
    except Exception as error:  # decoders raise whatever they like on broken files
        raise PromptError(_UNREADABLE, param="image") from error
    if image is None:
        raise PromptError(_UNREADABLE, param="image")
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PromptError(
            f"a picture may have at most {limits.max_pixels} pixels, got {width} x {height}",
            param="image",
        )
    if min(width, height) < limits.min_side:
        raise PromptError(
            f"a picture must have at least {limits.min_side} pixels on each side, "
            f"got {width} x {height}",
            param="image",
        )
    num_scans = data.count(_JPEG_SCAN) if data.startswith(_JPEG) else 0
    if num_scans > _MAX_JPEG_SCANS:
        raise PromptError(
            f"a JPEG may have at most {_MAX_JPEG_SCANS} scans, got {num_scans}", param="image"
        )
    try:
        image.load()
    except Exception as error:
        raise PromptError(_UNREADABLE, param="image") from error
    return image


def _open_header(data: bytes) -> ImageFile.ImageFile | None:
    """Read a file's header with the decoder that its first bytes name; None for no known kind.

    `Image.open` is avoided: it would try decoders that are not wanted here, warn on stderr about
    large pictures, and decode multi-picture JPEGs.
    """
    stream = io.BytesIO(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(stream)
    if data.startswith(_JPEG):
        return JpegImagePlugin.JpegImageFile(stream)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(stream)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile(stream)
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(stream)
    return None


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """The whole picture as RGB in the middle of a white square of `side` pixels.

    Any mode is taken; what is transparent becomes white, EXIF orientation is applied, and the
    longer side is resized to `side` (Lanczos).

    Raises:
        PromptError: the picture has no pixels, or its mode cannot be converted.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise PromptError(f"a picture must have pixels, got {width} x {height}", param="image")
    try:
        rgb = _to_rgb(image)
    except Exception as error:  # what a stranger's file left in `info` may surprise Pillow
        raise PromptError(
            f"a picture of mode {image.mode} cannot be converted to RGB", param="image"
        ) from error
    turn = _orientation(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    scale = side / max(rgb.size)
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(rgb, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey to 255, which makes nearly every picture white.
        order = ">u2" if image.mode.endswith("B") else "<u2"
        grey = np.frombuffer(image.tobytes(), dtype=order).reshape(image.height, image.width)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # no range of their own: more than 255 means 16 bits
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values = (values / 256 if values.max() > 255 else values).clip(0, 255)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return None


class ImageCodec:
    """Pixels <-> image token ids, with the autoencoder of a checkpoint.

    Immutable after loading, runs on the CPU in float32, and may be shared between threads.
    """

    def __init__(self, model: ImageAutoencoder, image_config: ImageConfig) -> None:
        """
        Raises:
            CheckpointError: the autoencoder's codes or grid are not those of `image_config`.
        """
        config = model.config
        grid = (config.grid_size, config.grid_size)
        if config.num_codes != image_config.num_codes or grid != image_config.grid:
            raise CheckpointError(
                f"image_tokenizer has {config.num_codes} codes and a grid of {grid}, config.json "
                f"says {image_config.num_codes} and {image_config.grid}"
            )
        self._model = model.float().eval().requires_grad_(False)
        self._config = image_config
        self.image_size = config.image_size
        """Height and width of decoded pictures in pixels."""
        white = Image.new("RGB", (config.image_size, config.image_size), (255, 255, 255))
        self._white = self.encode(white)

    @classmethod
    def load(cls, directory: Path, image_config: ImageConfig) -> ImageCodec:
        """Read `image_tokenizer/` (config.json, model.safetensors) of a checkpoint.

        Raises:
            CheckpointError: a file is missing or broken, or tensors are unknown, missing or
                misshaped.
        """
        data = read_json_object(directory / "config.json")
        try:
            model = ImageAutoencoder(ImageTokenizerConfig.from_dict(data))
        except CheckpointError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
        path = directory / "model.safetensors"
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors has error classes of its own
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        _check_same(path, "unknown", found.keys() - expected.keys())
        _check_same(path, "missing", expected.keys() - found.keys())
        misshaped = {
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if found[name] != shape
        }
        _check_same(path, "misshaped", misshaped)
        broken = {name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())}
        _check_same(path, "not finite", broken)
        model.load_state_dict(tensors)
        return cls(model, image_config)

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> tuple[int, ...]:
        """Token ids of a picture of any size and mode, in raster order.

        Raises:
            PromptError: the picture cannot be converted to RGB.
        """
        square = fit_square(image, self.image_size)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
        codes = self._model.encode(pixels.float() / 127.5 - 1)
        first = self._config.first_token_id
        return tuple(first + code for code in codes[0].tolist())

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int]) -> Image.Image:
        """The RGB picture of `tokens_per_image` image ids.

        Raises:
            PromptError: not exactly that many, or an id that is no image id.
        """
        config = self._config
        if len(token_ids) != config.tokens_per_image:
            raise PromptError(
                f"a picture has {config.tokens_per_image} image ids, got {len(token_ids)}",
                param="token_ids",
            )
        for token_id in token_ids:
            if type(token_id) is not int or not (
                config.first_token_id <= token_id < config.stop_token_id
            ):
                raise PromptError(
                    f"an image id must be from {config.first_token_id} to "
                    f"{config.stop_token_id - 1}, got {str(token_id)[:20]}",
                    param="token_ids",
                )
        codes = torch.tensor(token_ids, dtype=torch.long)[None] - config.first_token_id
        pixels = (self._model.decode(codes)[0] + 1) * 127.5
        array = pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(array)

    def decode_partial(self, token_ids: Sequence[int]) -> Image.Image:
        """The picture of its first image ids; the rest is shown white.

        Raises:
            PromptError: more than `tokens_per_image` ids, or an id that is no image id.
        """
        return self.decode((*token_ids, *self._white[len(token_ids) :]))


def _check_same(path: Path, problem: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:10])
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise CheckpointError(f"{path}: {problem} tensors: {shown}{more}")
