from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from momaserve_client import Client
from tests.client.both import KINDS, Answer, Script, make_client

Connect = Callable[..., Client]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which client; a test that asks for it runs on both."""
    return str(request.param)


@pytest.fixture
def connect(kind: str) -> Generator[Connect, None, None]:
    """Makes clients and closes them."""
    made: list[Client] = []

    def make(*args: Any, **options: Any) -> Client:
        made.append(make_client(kind, *args, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def answering(connect: Connect) -> Callable[..., Client]:
    """A client whose server gives these answers, one after the other."""

    def make(*answers: Answer, **options: Any) -> Client:
        return connect(transport=Script(*answers).transport, **options)

    return make
