"""`docs/api.md` says what the server does: its tables against the schemas and the limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from momaserve import sampling
from momaserve_server.errors import ERROR_TABLE
from momaserve_server.schemas_chat import MAX_PARTIAL_IMAGES, ChatRequest
from momaserve_server.schemas_common import IGNORED_FIELDS, StrictBody
from momaserve_server.schemas_completions import DEFAULT_MAX_TOKENS, CompletionRequest
from momaserve_server.schemas_images import ImageRequest

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ROUTES: dict[str, type[StrictBody]] = {"c": ChatRequest, "t": CompletionRequest, "i": ImageRequest}
WITHOUT_EFFECT = {"i": {"quality", "style", "moderation"}}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under `heading`, without its head."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


FIELDS = {
    cells[0].strip("`"): cells for cells in rows("Request fields of the routes that generate")
}


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_every_field_is_documented_for_its_routes(route: str) -> None:
    documented = {name for name, cells in FIELDS.items() if route in cells[1].split()}
    ignored = IGNORED_FIELDS | WITHOUT_EFFECT.get(route, set())
    assert documented == set(ROUTES[route].model_fields) - ignored


def test_ignored_fields_are_documented() -> None:
    for name in IGNORED_FIELDS | WITHOUT_EFFECT["i"]:
        assert f"`{name}`" in TEXT


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("n", f"1 to {sampling.MAX_N}"),
        ("temperature", f"0 to {sampling.MAX_TEMPERATURE:g}"),
        ("image_temperature", f"0 to {sampling.MAX_TEMPERATURE:g}"),
        ("guidance_scale", f"0 to {sampling.MAX_GUIDANCE_SCALE:g}"),
        ("repetition_penalty", f"above 0, at most {sampling.MAX_REPETITION_PENALTY:g}"),
        (
            "presence_penalty",
            f"-{sampling.MAX_ADDITIVE_PENALTY:g} to {sampling.MAX_ADDITIVE_PENALTY:g}",
        ),
        (
            "frequency_penalty",
            f"-{sampling.MAX_ADDITIVE_PENALTY:g} to {sampling.MAX_ADDITIVE_PENALTY:g}",
        ),
        ("priority", f"-{sampling.MAX_PRIORITY} to {sampling.MAX_PRIORITY}"),
        ("cache_salt", f"1 to {sampling.MAX_CACHE_SALT} characters"),
        ("timeout_s", f"above 0, at most {sampling.MAX_TIMEOUT_S:.0f}"),
        (
            "stop",
            f"{sampling.MAX_STOP_STRINGS} strings of 1 to {sampling.MAX_STOP_LENGTH} characters",
        ),
        ("stop_token_ids", f"{sampling.MAX_STOP_TOKEN_IDS} ids"),
        (
            "logit_bias",
            f"{sampling.MAX_LOGIT_BIAS} entries of -{sampling.MAX_LOGIT_BIAS_VALUE:g} "
            f"to {sampling.MAX_LOGIT_BIAS_VALUE:g}",
        ),
        ("top_logprobs", f"0 to {sampling.MAX_LOGPROBS}"),
        ("partial_images", f"**c** 0 to {MAX_PARTIAL_IMAGES}, **i** 0 to 3"),
    ],
)
def test_bounds_are_the_real_ones(name: str, bounds: str) -> None:
    assert FIELDS[name][3] == bounds


def test_defaults_are_the_real_ones() -> None:
    params = sampling.SamplingParams()
    for name in ("n", "min_tokens", "priority"):
        assert FIELDS[name][2] == str(getattr(params, name))
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert FIELDS[name][2] == f"{getattr(params, name):g}"
    assert FIELDS["guidance_scale"][2] == f"checkpoint ({params.guidance_scale:g})"
    for name in ("temperature", "top_k", "top_p", "min_p"):
        assert FIELDS[name][2] == f"checkpoint ({getattr(params.text, name):g})"
    assert f"**t** {DEFAULT_MAX_TOKENS}" in FIELDS["max_tokens"][2]


def test_every_error_is_documented() -> None:
    documented = {(int(c[0]), c[1].strip("`"), c[2].strip("`")) for c in rows("Errors")}
    assert documented == {(kind.status, kind.type, kind.code) for _, kind in ERROR_TABLE}


def test_links_to_this_page() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\]\(docs/api\.md\)", readme)
