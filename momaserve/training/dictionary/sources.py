"""Where the Debian packages put the files that the dictionary is made from.

One place that knows file system paths, so that a missing package is one clear error.
"""

from pathlib import Path

from momaserve.errors import DataError

FONT_PACKAGE = "fonts-noto-color-emoji"
CLDR_PACKAGE = "unicode-cldr-core"
WORDNET_PACKAGE = "wordnet-base"

FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR_FOLDER = Path("/usr/share/unicode/cldr/common")
WORDNET_FOLDER = Path("/usr/share/wordnet")
DOC_FOLDER = Path("/usr/share/doc")


def require(path: Path, package: str) -> Path:
    """Returns `path` if it is a file.

    Raises:
        DataError: it is not there; the message names the Debian package to install.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: run 'apt-get install {package}'")
    return path
