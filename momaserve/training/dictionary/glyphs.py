"""Pictures of emoji strings, drawn with the Noto Color Emoji font.

Knows the font and Pillow; knows nothing of names.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, features

from momaserve.errors import DataError
from momaserve.training.dictionary.sources import FONT_FILE, FONT_PACKAGE, require

FONT_SIZE = 109
"""The one size at which the font holds bitmaps."""
GLYPH_WIDTH = 136
GLYPH_HEIGHT = 128

Pixels = npt.NDArray[np.uint8]


class GlyphRenderer:
    """Draws emoji strings as square RGB pictures on white.

    The font's bitmaps are 136 x 128 and keep at least 4 pixels empty on either side, so cutting
    them to the middle 128 x 128 loses nothing and 64 pixels are an exact halving.
    """

    def __init__(self, size: int = 64, font_file: Path = FONT_FILE) -> None:
        """
        Args:
            size: width and height of the pictures in pixels.
            font_file: the Noto Color Emoji font.

        Raises:
            DataError: the font is missing, or Pillow was built without raqm.
        """
        if not features.check("raqm"):
            raise DataError("Pillow has no raqm text layout: install the Pillow wheel from PyPI")
        if size < 1:
            raise DataError(f"size must be at least 1, got {size}")
        self.size = size
        self._font = ImageFont.truetype(
            str(require(font_file, FONT_PACKAGE)),
            FONT_SIZE,
            layout_engine=ImageFont.Layout.RAQM,
        )

    def render(self, emoji: str) -> Pixels | None:
        """Returns uint8 [size, size, 3], or None if `emoji` is not exactly one colour glyph."""
        if emoji.isascii() or round(self._font.getlength(emoji)) != GLYPH_WIDTH:
            return None
        glyph = Image.new("RGBA", (GLYPH_WIDTH, GLYPH_HEIGHT), (255, 255, 255, 0))
        ImageDraw.Draw(glyph).text((0, 0), emoji, font=self._font, embedded_color=True)
        if glyph.getchannel("A").getbbox() is None:
            return None
        canvas = Image.new("RGBA", (GLYPH_HEIGHT, GLYPH_HEIGHT), (255, 255, 255, 255))
        margin = (GLYPH_WIDTH - GLYPH_HEIGHT) // 2
        canvas.alpha_composite(glyph, source=(margin, 0, GLYPH_WIDTH - margin, GLYPH_HEIGHT))
        picture = canvas.convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)
        return np.asarray(picture, dtype=np.uint8)
