"""The licence notices that must travel with a checkpoint trained on this data."""

from pathlib import Path

from momaserve.training.dictionary.sources import (
    CLDR_PACKAGE,
    DOC_FOLDER,
    FONT_PACKAGE,
    WORDNET_PACKAGE,
    require,
)

TITLES = {
    FONT_PACKAGE: "Noto Color Emoji font (pictures): SIL Open Font License 1.1",
    CLDR_PACKAGE: "Unicode CLDR (names and keywords): Unicode-DFS-2016",
    WORDNET_PACKAGE: "WordNet 3.0 (glosses): WordNet licence",
}


def collect_notices(doc_folder: Path = DOC_FOLDER) -> str:
    """Returns the copyright files of the three Debian packages, word for word, under titles.

    Raises:
        DataError: a package is not installed.
    """
    sections = []
    for package, title in TITLES.items():
        path = require(doc_folder / package / "copyright", package)
        heading = f"{title}\n(from the Debian package {package})\n{'=' * len(title)}"
        sections.append(f"{heading}\n\n{path.read_text(encoding='utf-8').strip()}\n")
    return "\n\n".join(sections)
