"""Rules for the whole suite: few threads, and no silent skips where CI forbids them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With MOMASERVE_ALLOWED_SKIPS=GPU a test skipped for any other reason fails the run."""
    allowed = os.environ.get("MOMASERVE_ALLOWED_SKIPS")
    if allowed is None:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    for report in reporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        if not reason.removeprefix("Skipped: ").startswith(allowed):
            reporter.write_line(f"forbidden skip: {report.nodeid}: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
