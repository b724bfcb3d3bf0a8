import logging
import threading
from collections.abc import Generator

import pytest

from momaserve_server.logs import OURS, StderrHandler


@pytest.fixture
def anyio_backend() -> str:
    """The engine's streams live on asyncio; the tests do too."""
    return "asyncio"


@pytest.fixture(autouse=True)
def logging_stays_as_it_is() -> Generator[None, None, None]:
    """`momaserve serve` configures the logging of its process, which here is the tests' own."""
    root, hook = logging.getLogger(), threading.excepthook
    levels = {name: logging.getLogger(name).level for name in ("", *OURS)}
    yield
    for handler in [h for h in root.handlers if isinstance(h, StderrHandler)]:
        root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)
    threading.excepthook = hook
