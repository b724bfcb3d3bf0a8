"""`--api-key-file FILE`. Imports nothing heavy: it is part of reading the command line."""

from __future__ import annotations

from pathlib import Path

from momaserve.errors import ConfigError


def read_key_file(name: str) -> tuple[str, ...]:
    """The keys in a file: one per line; blank lines and those that begin with # do not count.

    Raises:
        ConfigError: it cannot be read, or has no key.
    """
    path = Path(name)
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ConfigError(
            f"the key file {path} cannot be read: {error.strerror or error}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"the key file {path} is not ASCII text") from None
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"the key file {path} has no key in it")
    return tuple(keys)
