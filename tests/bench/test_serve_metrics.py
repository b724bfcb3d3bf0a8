"""The numbers of a run, from records made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from momaserve.errors import ConfigError
from momaserve_bench.records import Outcome, RequestRecord
from momaserve_bench.serve_metrics import (
    durations,
    is_good,
    measurements,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    summarize,
)
from momaserve_bench.serve_options import METRICS
from momaserve_bench.spread import linear_percentile, spread
from momaserve_bench.workload import Kind


def record(kind: Kind = Kind.TEXT, **changes: Any) -> RequestRecord:
    """Due at 1.0, sent at 1.5, first byte at 1.75, tokens at 2.0, 2.25 and 3.0, over at 3.5."""
    values: dict[str, Any] = {
        "index": 0,
        "kind": kind,
        "scheduled_s": 1.0,
        "sent_s": 1.5,
        "first_byte_s": 1.75,
        "token_times_s": [2.0, 2.25, 3.0],
        "last_byte_s": 3.5,
        "prompt_tokens": 7,
        "output_tokens": 3,
        "outcome": Outcome.COMPLETED,
    }
    return RequestRecord(**{**values, **changes})


def picture(**changes: Any) -> RequestRecord:
    """Half drawn 2 s after it was sent, whole after 4 s."""
    values: dict[str, Any] = {
        "token_times_s": [],
        "first_partial_image_s": 3.5,
        "image_s": 5.5,
        "last_byte_s": 5.5,
        "prompt_tokens": 10,
        "output_tokens": 64,
        "image_tokens": 64,
        "images": 1,
    }
    return record(Kind.IMAGE_OUTPUT, **{**values, **changes})


PROBE = record(Kind.PROBE, token_times_s=[1.75], output_tokens=1, last_byte_s=2.0)
FAILED = RequestRecord(
    index=0,
    kind=Kind.TEXT,
    scheduled_s=0.0,
    sent_s=0.0,
    last_byte_s=9.0,
    output_tokens=2,
    reason="429 queue_full",
    message="no room",
)
CANCELLED = record(outcome=Outcome.CANCELLED)


# --- one request ---------------------------------------------------------------------------


def test_both_clocks_of_an_answer_in_words() -> None:
    assert durations(record()) == {
        "ttft": 0.5,
        "scheduled_ttft": 1.0,
        "tpot": 0.5,
        "itl": 0.75,
        "e2el": 2.0,
        "scheduled_e2el": 2.5,
        "first_byte": 0.25,
        "image_latency": None,
        "scheduled_image_latency": None,
        "first_partial_image": None,
    }


def test_a_picture_has_times_of_its_own() -> None:
    found = {name: value for name, value in durations(picture()).items() if value is not None}
    assert found == {
        "e2el": 4.0,
        "scheduled_e2el": 4.5,
        "first_byte": 0.25,
        "image_latency": 4.0,
        "scheduled_image_latency": 4.5,
        "first_partial_image": 2.0,
    }
    by_ids = picture(token_times_s=[2.0, 3.0, 5.5], first_partial_image_s=None)
    assert durations(by_ids)["ttft"] is None
    assert durations(by_ids)["itl"] is None


def test_one_token_has_no_gap() -> None:
    found = durations(record(token_times_s=[2.0], output_tokens=1))
    assert (found["ttft"], found["tpot"], found["itl"]) == (0.5, None, None)


def test_pieces_of_several_tokens() -> None:
    """Five tokens in two pieces: one gap, but four tokens came after the first."""
    found = durations(record(token_times_s=[2.0, 4.0], output_tokens=5))
    assert (found["tpot"], found["itl"]) == (0.5, 2.0)


def test_a_probe_is_counted_apart() -> None:
    assert durations(PROBE) == {"probe": 0.5}


# --- goodput -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "is_sent_good", "is_due_good"),
    [
        ({"ttft": 500.0}, True, False),
        ({"ttft": 499.0}, False, False),
        ({"ttft": 1000.0}, True, True),
        ({"itl": 750.0}, True, True),
        ({"itl": 749.0}, False, False),
        ({"tpot": 500.0}, True, True),
        ({"ttft": 1000.0, "e2el": 1999.0}, False, False),
        ({"ttft": 1000.0, "e2el": 2400.0}, True, False),
        ({"image_latency": 1.0}, True, True),  # it has none
    ],
)
def test_a_good_request_keeps_every_limit(
    limits: dict[str, float], is_sent_good: bool, is_due_good: bool
) -> None:
    assert is_good(record(), limits) is is_sent_good
    assert is_good(record(), limits, is_scheduled=True) is is_due_good


def test_a_picture_is_good_by_its_latency() -> None:
    assert is_good(picture(), {"image_latency": 4000.0, "ttft": 1.0})
    assert not is_good(picture(), {"image_latency": 3999.0})
    assert not is_good(picture(), {"image_latency": 4000.0}, is_scheduled=True)


def test_limits_are_read() -> None:
    assert parse_goodput(["ttft:200", "itl:1.5"]) == {"ttft": 200.0, "itl": 1.5}
    assert parse_goodput([]) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed:3"], "--goodput knows ttft, tpot, itl, e2el, image_latency, not 'speed'"),
        (["ttft"], "--goodput ttft needs a limit above 0 ms, got ''"),
        (["ttft:x"], "got 'x'"),
        (["ttft:-1"], "got '-1'"),
        (["ttft:inf"], "got 'inf'"),
        (["ttft:1", "ttft:2"], "--goodput names ttft twice"),
    ],
)
def test_limits_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_goodput(words)


def test_names_and_percentiles_are_read() -> None:
    assert parse_metrics("ttft, itl") == ["ttft", "itl"]
    assert parse_metrics("") == []
    assert parse_percentiles("50,99.9") == [50.0, 99.9]
    with pytest.raises(ConfigError, match="--percentile-metrics knows .*, not 'x'"):
        parse_metrics("ttft,x")
    for text in ("101", "-1", "x", "", "nan"):
        with pytest.raises(ConfigError, match="--metric-percentiles must be numbers between"):
            parse_percentiles(text)


# --- a run ---------------------------------------------------------------------------------


def test_percentiles_lie_between_ranks() -> None:
    values = [4.0, 1.0, 2.0, 3.0]
    assert linear_percentile(values, 50) == 2.5
    assert linear_percentile(values, 99) == pytest.approx(3.97)
    assert linear_percentile(values, 0) == 1.0
    assert spread("x", [0.001, 0.003], [50, 99.9]) == pytest.approx(
        {
            "mean_x_ms": 2.0,
            "median_x_ms": 2.0,
            "std_x_ms": 1.0,
            "p50_x_ms": 2.0,
            "p99.9_x_ms": 2.998,
        }
    )
    assert spread("x", [], [99]) == dict.fromkeys(
        ("mean_x_ms", "median_x_ms", "std_x_ms", "p99_x_ms")
    )


def test_a_whole_run() -> None:
    late = record(scheduled_s=0.0, token_times_s=[2.5, 2.75, 3.5], last_byte_s=4.0)
    records = [record(), late, picture(), PROBE, FAILED, CANCELLED]
    found = summarize(records, 10.0, goodput_ms={"ttft": 600.0, "e2el": 4000.0})
    assert (found["completed"], found["failed"], found["cancelled"]) == (4, 1, 1)
    assert (found["probes"], found["images"], found["duration"]) == (1, 1, 10.0)
    assert found["failures"] == [{"reason": "429 queue_full", "count": 1, "example": "no room"}]
    assert found["request_throughput"] == 0.4
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (31, 71)
    assert found["output_throughput"] == 7.1
    assert found["text_output_throughput"] == 0.7
    assert found["image_output_throughput"] == 6.4
    assert found["total_token_throughput"] == pytest.approx(10.2)
    assert found["images_per_s"] == 0.1
    # Sent: 0.5 s and 1 s to the first token. Due: 1 s and 2.5 s; the picture is over after 4.5 s.
    assert found["request_goodput"] == 0.2
    assert found["scheduled_request_goodput"] == 0.0
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == 750.0
    assert found["std_ttft_ms"] == 250.0
    assert found["p99_ttft_ms"] == pytest.approx(995.0)
    assert found["mean_scheduled_ttft_ms"] == 1750.0
    assert found["mean_itl_ms"] == 500.0  # 250, 750, 250 and 750
    assert found["p50_itl_ms"] == 500.0
    assert found["mean_tpot_ms"] == 500.0
    assert found["mean_e2el_ms"] == pytest.approx(1e3 * (2.0 + 2.5 + 4.0) / 3)
    assert found["mean_image_latency_ms"] == found["p99_image_latency_ms"] == 4000.0
    assert found["mean_first_partial_image_ms"] == 2000.0
    assert found["mean_probe_ms"] == 500.0


def test_percentiles_only_of_what_was_asked_for() -> None:
    found = summarize(
        [record()], 1.0, goodput_ms={}, percentile_metrics=["ttft"], percents=[99.0, 90.0]
    )
    assert found["p99_ttft_ms"] == found["p90_ttft_ms"] == 500.0
    assert "p50_ttft_ms" not in found
    assert not any(key.startswith("p9") and "ttft" not in key for key in found)
    assert found["mean_itl_ms"] == 500.0
    assert found["request_goodput"] is None


def test_nothing_answered_is_none_not_zero() -> None:
    found = summarize([FAILED, FAILED], 2.0, goodput_ms={"ttft": 1.0})
    assert (found["completed"], found["failed"], found["request_throughput"]) == (0, 2, 0.0)
    assert found["request_goodput"] == 0.0
    for name in METRICS:
        assert found[f"mean_{name}_ms"] is None
        assert found[f"p99_{name}_ms"] is None


def test_the_commonest_failure_comes_first() -> None:
    other = RequestRecord(index=1, kind=Kind.TEXT, scheduled_s=0.0)
    other.fail("ReadError", "gone")
    again = RequestRecord(index=2, kind=Kind.TEXT, scheduled_s=0.0)
    again.fail("429 queue_full", "another")
    found = summarize([other, FAILED, again], 1.0, goodput_ms={})["failures"]
    assert found == [
        {"reason": "429 queue_full", "count": 2, "example": "no room"},
        {"reason": "ReadError", "count": 1, "example": "gone"},
    ]


def test_measurements_keep_every_gap() -> None:
    found = measurements([record(), PROBE, picture()])
    assert found["itl"] == [0.25, 0.75]
    assert found["probe"] == [0.5]
    assert set(found) == set(METRICS)
