import pytest


@pytest.fixture
def anyio_backend() -> str:
    """The engine's streams live on asyncio; the tests do too."""
    return "asyncio"
