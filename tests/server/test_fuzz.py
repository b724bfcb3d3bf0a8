"""Generated requests against `/openapi.json`: no 5xx, no status and no reply that it hides."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok

from tests.server.asgi import make_app
from tests.server.fake_engine import FakeAsyncEngine

CASES = 150
"""Of each operation."""


class Restarted(FakeAsyncEngine):
    """The library starts and ends the application with each of its sessions."""

    async def drain(self, timeout_s: float) -> None:
        pass


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", make_app(Restarted()))
OPERATIONS = {
    found.ok().label: found.ok()
    for found in SCHEMA.get_all_operations()
    if isinstance(found, Ok)  # the others would make test_openapi fail
}

load_all_checks()
NOT_IN_A_SCHEMA: list[Any] = list(CHECKS.get_by_names(["positive_data_acceptance"]))
"""A schema cannot say that a prompt fits the context, or that bytes are a picture."""


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_one_that_the_document_announces(label: str) -> None:
    operation = OPERATIONS[label]

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def answers(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(excluded_checks=NOT_IN_A_SCHEMA)

    answers()
