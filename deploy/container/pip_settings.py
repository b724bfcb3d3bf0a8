"""Hands the builder's pip settings to a container build.

Writes what `pip config list` says (files and environment) as one pip.conf, and prints, one word
per line, the `--volume` options for the local files and directories that it names.
"""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "timeout", "no-index")


def effective_settings() -> dict[str, str]:
    """Global settings by name; the environment's win, as they do for pip itself."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section) and name.removeprefix(section) in KEYS:
                found[name.removeprefix(section)] = ast.literal_eval(value)
    return found


def local_paths(settings: dict[str, str]) -> list[Path]:
    """Existing files and directories of this machine that the settings name."""
    found: set[Path] = set()
    for key, value in settings.items():
        for word in value.split():
            url = urlsplit(word)
            path = Path(url.path)
            if url.scheme not in ("", "file") or not path.is_absolute() or not path.exists():
                continue
            # The pages of an index name files that lie beside it.
            found.add(path.parent if key.endswith("index-url") else path)
    return sorted(found)


def main(target: str) -> None:
    settings = effective_settings()
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = settings
    with Path(target).open("w") as file:
        config.write(file)
    for path in local_paths(settings):
        print(f"--volume={path}:{path}:ro")


if __name__ == "__main__":
    main(sys.argv[1])
