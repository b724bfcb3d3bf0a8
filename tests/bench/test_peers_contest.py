"""Taking turns: order, prompts, what counts, and what happens to an engine that fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from momaserve.models.presets import preset_config
from momaserve_bench.peers.contest import (
    Case,
    Contest,
    Entrant,
    check_answer,
    entrants_of,
)
from momaserve_bench.peers.engine_process import EngineFailure

_CONFIG = preset_config("moma-435m-4t4i")
_DECODE = Case(kind="decode", batch_size=2, input_len=4, output_len=3)
_PREFILL = Case(kind="prefill", batch_size=1, input_len=100, output_len=1)
_JOBS: dict[str, dict[str, Any]] = {name: {"model": name} for name in ("momaserve", "a", "b")}


@dataclass
class FakePlayer:
    """Answers with times that it is given: the k-th run takes 1 + k seconds a token."""

    name: str
    log: list[tuple[str, dict[str, Any]]]
    fails_at: int | None = None
    """The run in which it dies."""
    cpu_step_s: float = 0.0
    """CPU time that it uses between two looks."""
    num_runs: int = 0
    is_closed: bool = field(default=False, init=False)
    cpu_s: float = field(default=0.0, init=False)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if "load" in request:
            if self.fails_at == -1:
                raise EngineFailure(f"{self.name} died at load")
            return {"versions": {self.name: "1"}, "settings": request["load"]}
        run = request["run"]
        self.log.append((self.name, run))
        if self.num_runs == self.fails_at:
            raise EngineFailure(f"{self.name} died")
        self.num_runs += 1
        rows = range(len(run["prompts"]))
        times = [[self.num_runs * (i + 1.0) for i in range(run["num_new"])] for _ in rows]
        tokens = [[100 + row] * run["num_new"] for row in rows]
        return {"tokens": tokens, "times": times, "settings": {"runs": self.num_runs}}

    def cpu_seconds(self) -> float | None:
        self.cpu_s += self.cpu_step_s
        return self.cpu_s

    def close(self) -> None:
        self.is_closed = True


def make_contest(*players: FakePlayer) -> tuple[Contest, list[str]]:
    said: list[str] = []
    contest = Contest(players, _CONFIG, seed=7, pause_s=0.0, say=said.append)
    contest.load(_JOBS)
    return contest, said


def entrants(*names: str) -> list[Entrant]:
    return [Entrant(name) for name in names]


def test_engines_take_turns_within_every_round() -> None:
    log: list[tuple[str, dict[str, Any]]] = []
    contest, _ = make_contest(*(FakePlayer(name, log) for name in ("momaserve", "a", "b")))
    contest.run(_DECODE, entrants("momaserve", "a", "b"), rounds=2)
    assert [name for name, _ in log] == ["momaserve", "a", "b"] * 3  # the first is warm-up


def test_the_first_run_is_not_counted() -> None:
    contest, _ = make_contest(FakePlayer("a", []))
    measured = contest.run(_DECODE, entrants("a"), rounds=2)["a"]
    # Runs 2 and 3 take 2 and 3 seconds a token, two rows each; run 1 would have been 2 tokens/s.
    assert measured.rates == [pytest.approx(1.0), pytest.approx(2 / 3)]
    assert measured.first_token_s == [2.0, 3.0]
    assert measured.num_distinct_tokens == 2
    assert measured.first_token_ids == [100, 101]


def test_prefill_counts_the_tokens_of_the_prompt() -> None:
    contest, _ = make_contest(FakePlayer("a", []))
    assert contest.run(_PREFILL, entrants("a"), rounds=1)["a"].rates == [100 / 2.0]


def test_all_get_the_same_prompts_and_every_round_its_own() -> None:
    log: list[tuple[str, dict[str, Any]]] = []
    contest, _ = make_contest(FakePlayer("momaserve", log), FakePlayer("a", log))
    contest.run(_DECODE, entrants("momaserve", "a"), rounds=1)
    warm_up, warm_up_peer, first, first_peer = [run["prompts"] for _, run in log]
    assert warm_up == warm_up_peer
    assert first == first_peer
    assert first != warm_up
    assert all(len(prompt) == 4 for prompt in first)
    assert first[0] != first[1]
    image = _CONFIG.image
    assert image is not None
    lowest = max(image.begin_token_id, image.stop_token_id)
    assert all(lowest < token < _CONFIG.vocab_size for prompt in first for token in prompt)


def test_rows_that_draw_end_their_prompt_with_begin_image() -> None:
    log: list[tuple[str, dict[str, Any]]] = []
    contest, _ = make_contest(FakePlayer("momaserve", log))
    who = [Entrant("momaserve", rows) for rows in ("text", "image", "mixed")]
    contest.run(_DECODE, who, rounds=1)
    text, image, mixed = [run for _, run in log[3:]]
    assert text["pictures"] == [False, False]
    assert image["pictures"] == [True, True]
    assert mixed["pictures"] == [False, True]
    assert _CONFIG.image is not None
    begin = _CONFIG.image.begin_token_id
    assert [prompt[-1] == begin for prompt in mixed["prompts"]] == [False, True]
    assert [prompt[:-1] for prompt in image["prompts"]] == [p[:-1] for p in text["prompts"]]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_an_engine_that_dies_is_named_and_the_others_go_on(fails_at: int) -> None:
    log: list[tuple[str, dict[str, Any]]] = []
    dying = FakePlayer("a", log, fails_at=fails_at)
    contest, said = make_contest(dying, FakePlayer("b", log))
    measured = contest.run(_DECODE, entrants("a", "b"), rounds=3)
    assert measured.keys() == {"b"}
    assert len(measured["b"].rates) == 3
    assert contest.failures == {"a": "a died"}
    assert "a died" in said
    assert dying.is_closed
    assert [name for name, _ in log].count("a") == fails_at + 1
    assert contest.run(_DECODE, entrants("a", "b"), rounds=1).keys() == {"b"}


def test_an_engine_that_cannot_load_takes_no_part() -> None:
    contest, said = make_contest(FakePlayer("a", [], fails_at=-1), FakePlayer("b", []))
    assert contest.failures == {"a": "a died at load"}
    assert contest.engines.keys() == contest.players.keys() == {"b"}
    assert said == ["loading a", "a died at load", "loading b"]


def test_an_engine_that_dies_loses_all_its_kinds_of_rows() -> None:
    dying = FakePlayer("momaserve", [], fails_at=5)  # in the second round, drawing
    contest, _ = make_contest(dying, FakePlayer("a", []))
    who = [Entrant("momaserve"), Entrant("momaserve", "image"), Entrant("a")]
    assert contest.run(_DECODE, who, rounds=3).keys() == {"a"}


def test_settings_are_those_after_the_runs_and_load_time_is_kept() -> None:
    contest, _ = make_contest(FakePlayer("a", []))
    assert contest.engines["a"]["settings"] == {"model": "a"}
    contest.run(_DECODE, entrants("a"), rounds=1)
    assert contest.engines["a"]["settings"] == {"runs": 2}
    assert contest.engines["a"]["versions"] == {"a": "1"}
    assert contest.engines["a"]["load_s"] >= 0


def test_cpu_time_of_idle_engines_is_counted() -> None:
    contest, _ = make_contest(FakePlayer("a", []), FakePlayer("b", [], cpu_step_s=0.25))
    contest.run(_DECODE, entrants("a", "b"), rounds=1)
    assert contest.idleness["a"].cpu_s == 0.0
    assert contest.idleness["b"].cpu_s == 0.5  # two turns of a
    assert contest.idleness["b"].wall_s > 0


_GOOD: dict[str, Any] = {
    "tokens": [[5, 6, 7], [8, 9, 10]],
    "times": [[1.0, 2.0, 3.0]] * 2,
    "settings": {},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[5, 6], [8, 9, 10]]}, "x made 2 tokens with 3 times in row 0, 3 were"),
        ({"tokens": [[5, 6, 7], [8, 9, 10, 11]]}, "x made 4 tokens with 3 times in row 1, 3 were"),
        ({"times": [[1.0, 2.0, 3.0], [1.0]]}, "x made 3 tokens with 1 times in row 1"),
        ({"tokens": [[5, 6, 7]]}, "x answered 1 rows, 2 were asked for"),
        ({"tokens": [[5, 6, 65536], [8, 9, 10]]}, "x made token 65536, there are 65536"),
        ({"times": [[1.0, 3.0, 2.0]] * 2}, "x gave times that do not increase in row 0"),
        ({"times": [[0.0, 1.0, 2.0]] * 2}, "x gave times that do not increase in row 0"),
        ({"times": [[1.0, 1.0, 1.0]] * 2}, "x gave times of no use"),
    ],
)
def test_answers_are_checked(change: dict[str, Any], message: str) -> None:
    check_answer("x", _GOOD, _DECODE, 65536)
    with pytest.raises(EngineFailure, match=message):
        check_answer("x", _GOOD | change, _DECODE, 65536)


def test_an_answer_without_times_is_no_answer() -> None:
    with pytest.raises(EngineFailure, match="x answered without settings, times"):
        check_answer("x", {"tokens": []}, _DECODE, 65536)


def test_ours_runs_with_each_kind_of_rows_where_pictures_have_experts() -> None:
    engines = ["momaserve", "vllm"]
    labels = [one.label for one in entrants_of(engines, _CONFIG, _DECODE)]
    assert labels == ["momaserve", "momaserve (image)", "momaserve (mixed)", "vllm"]
    alone = Case(kind="decode", batch_size=1, input_len=4, output_len=3)
    labels = [one.label for one in entrants_of(engines, _CONFIG, alone)]
    assert labels == ["momaserve", "momaserve (image)", "vllm"]
    for config, case in ((_CONFIG, _PREFILL), (preset_config("moma-435m-moe-8x"), _DECODE)):
        assert [one.label for one in entrants_of(engines, config, case)] == engines


def test_a_player_can_be_asked_more_until_it_fails() -> None:
    contest, said = make_contest(FakePlayer("a", [], fails_at=-1), FakePlayer("b", []))
    work = contest.work(_DECODE, "mixed", 1)
    answer = contest.ask("b", {"run": work})
    assert answer is not None and len(answer["tokens"]) == 2
    assert work["pictures"] == [False, True] and work["num_new"] == 3
    assert contest.work(_DECODE, "mixed", 1) == work
    assert contest.work(_DECODE, "mixed", 2) != work
    assert contest.ask("a", {"run": work}) is None  # it could not load
    contest.players["b"].num_runs = contest.players["b"].fails_at = 7  # type: ignore[attr-defined]
    assert contest.ask("b", {"run": work}) is None
    assert contest.failures["b"] == said[-1] == "b died"
    assert contest.players == {}
