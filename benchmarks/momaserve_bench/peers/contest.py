"""Engines that take turns at the same work, round by round, so that drift hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from momaserve.models.config import ModelConfig
from momaserve_bench.peers.engine_process import EngineFailure
from momaserve_bench.peers.engines import OURS
from momaserve_bench.peers.rates import decode_rate, first_token_s


class Player(Protocol):
    """An engine that answers; `EngineProcess` is one."""

    name: str

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises EngineFailure."""

    def cpu_seconds(self) -> float | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One piece of work."""

    kind: str
    """`decode` or `prefill`: what is timed."""
    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Entrant:
    """An engine, and for ours which rows draw."""

    engine: str
    rows: str = "text"
    """`text`, `image` or `mixed`; others know text alone."""

    @property
    def label(self) -> str:
        return self.engine if self.rows == "text" else f"{self.engine} ({self.rows})"


@dataclass(slots=True)
class Measured:
    """What one entrant did in one case."""

    rates: list[float] = field(default_factory=list)
    """Tokens/s of each round, by `rates.DEFINITION`."""
    first_token_s: list[float] = field(default_factory=list)
    first_token_ids: list[int] = field(default_factory=list)
    """Of the last round's rows."""
    num_distinct_tokens: int = 0
    """Of the last round: greedy answers of random weights may go round in circles."""


@dataclass(slots=True)
class Idleness:
    """CPU time that an engine used while another had its turn."""

    cpu_s: float = 0.0
    wall_s: float = 0.0


class Contest:
    """Owns the players of one pair.

    A player that fails is closed, named in `failures`, and takes no further part.
    """

    def __init__(
        self,
        players: Sequence[Player],
        config: ModelConfig,
        *,
        seed: int,
        pause_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.players = {player.name: player for player in players}
        self.failures: dict[str, str] = {}
        self.engines: dict[str, dict[str, Any]] = {}
        """Versions, settings and `load_s` (process start to model ready) of those that loaded."""
        self.idleness = {player.name: Idleness() for player in players}
        self._config = config
        self._seed = seed
        self._pause_s = pause_s
        self._say = say
        image = config.image
        specials = [config.bos_token_id, config.pad_token_id, config.eos_token_id]
        if image is not None:
            specials += [image.begin_token_id, image.end_token_id, image.stop_token_id - 1]
        self._first_word_id = max(specials) + 1

    def load(self, jobs: Mapping[str, dict[str, Any]]) -> None:
        """Fills `engines`, one player after the other."""
        for name, player in list(self.players.items()):
            self._say(f"loading {name}")
            started = time.perf_counter()
            try:
                answer = player.ask({"load": jobs[name]})
            except EngineFailure as failure:
                self._drop(name, failure)
                continue
            self.engines[name] = {**answer, "load_s": time.perf_counter() - started}

    def run(self, case: Case, entrants: Sequence[Entrant], rounds: int) -> dict[str, Measured]:
        """What each entrant did, by its label; one that fails on the way is not in it.

        Every round gives all of them a turn, with new prompts; the first is not counted.
        """
        measured = {entrant.label: Measured() for entrant in entrants}
        for number in range(rounds + 1):
            for entrant in entrants:
                if entrant.engine not in self.players:
                    measured.pop(entrant.label, None)
                    continue
                try:
                    tokens, times = self._turn(case, entrant, number)
                except EngineFailure as failure:
                    self._drop(entrant.engine, failure)
                    measured.pop(entrant.label, None)
                    continue
                if number == 0:
                    continue  # warm-up
                one = measured[entrant.label]
                first = first_token_s(times)
                is_decode = case.kind == "decode"
                one.rates.append(decode_rate(times) if is_decode else case.input_len / first)
                one.first_token_s.append(first)
                one.first_token_ids = [row[0] for row in tokens]
                one.num_distinct_tokens = len({token for row in tokens for token in row})
        dropped = self.failures.keys()
        engines = {entrant.label: entrant.engine for entrant in entrants}
        return {label: one for label, one in measured.items() if engines[label] not in dropped}

    def ask(self, name: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """What a player answers; None if it takes no part any more, or fails now."""
        if name not in self.players:
            return None
        try:
            return self.players[name].ask(request)
        except EngineFailure as failure:
            self._drop(name, failure)
            return None

    def work(self, case: Case, rows: str, number: int) -> dict[str, Any]:
        """What is asked of an entrant in a round: the arguments of its `run`."""
        pictures = [_draws(rows, row) for row in range(case.batch_size)]
        prompts = self._prompts(case, number, pictures)
        return {"prompts": prompts, "num_new": case.output_len, "pictures": pictures}

    def _turn(
        self, case: Case, entrant: Entrant, number: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        work = self.work(case, entrant.rows, number)
        others = {n: p for n, p in self.players.items() if n != entrant.engine}
        time.sleep(self._pause_s)
        before = {name: player.cpu_seconds() for name, player in others.items()}
        started = time.perf_counter()
        answer = self.players[entrant.engine].ask({"run": work})
        wall_s = time.perf_counter() - started
        for name, player in others.items():
            earlier, later = before[name], player.cpu_seconds()
            if earlier is not None and later is not None:
                self.idleness[name].cpu_s += later - earlier
                self.idleness[name].wall_s += wall_s
        check_answer(entrant.engine, answer, case, self._config.vocab_size)
        self.engines[entrant.engine]["settings"] = answer["settings"]
        return answer["tokens"], answer["times"]

    def _prompts(self, case: Case, number: int, pictures: Sequence[bool]) -> list[list[int]]:
        """The same words for all entrants; a row that draws ends with begin_image."""
        rng = random.Random(f"{self._seed} {case} {number}")
        prompts = [
            [rng.randrange(self._first_word_id, self._config.vocab_size) for _ in range(length)]
            for length in [case.input_len] * case.batch_size
        ]
        image = self._config.image
        for prompt, draws in zip(prompts, pictures, strict=True):
            if draws and image is not None:
                prompt[-1] = image.begin_token_id
        return prompts

    def _drop(self, name: str, failure: EngineFailure) -> None:
        self._say(str(failure))
        self.failures[name] = str(failure)
        self.players.pop(name).close()


def _draws(rows: str, row: int) -> bool:
    return rows == "image" or (rows == "mixed" and row % 2 == 1)


def check_answer(name: str, answer: Mapping[str, Any], case: Case, vocab_size: int) -> None:
    """Raises EngineFailure unless every row has its tokens, and a time for each in order."""
    missing = sorted({"tokens", "times", "settings"} - answer.keys())
    if missing:
        raise EngineFailure(f"{name} answered without {', '.join(missing)}")
    tokens, times = answer["tokens"], answer["times"]
    if len(tokens) != case.batch_size or len(times) != case.batch_size:
        raise EngineFailure(f"{name} answered {len(tokens)} rows, {case.batch_size} were asked for")
    for row, (ids, seconds) in enumerate(zip(tokens, times, strict=True)):
        if len(ids) != case.output_len or len(seconds) != case.output_len:
            raise EngineFailure(
                f"{name} made {len(ids)} tokens with {len(seconds)} times in row {row}, "
                f"{case.output_len} were asked for"
            )
        strange = [token for token in ids if not 0 <= token < vocab_size]
        if strange:
            raise EngineFailure(f"{name} made token {strange[0]}, there are {vocab_size}")
        if seconds[0] <= 0 or sorted(seconds) != seconds:
            raise EngineFailure(f"{name} gave times that do not increase in row {row}")
    if case.kind == "decode":
        try:
            decode_rate(times)
        except ValueError as error:
            raise EngineFailure(f"{name} gave times of no use: {error}") from error


def entrants_of(engines: Sequence[str], config: ModelConfig, case: Case) -> list[Entrant]:
    """Who runs in a case: every engine once; ours for each kind of rows that it has experts for.

    A kind of its own for pictures is only of interest where they have their own experts, and
    while decoding; half of one row is none.
    """
    has_own_experts = config.image is not None and len(config.expert_groups) > 1
    entrants: list[Entrant] = []
    for engine in engines:
        entrants.append(Entrant(engine))
        if engine == OURS and has_own_experts and case.kind == "decode":
            entrants.append(Entrant(engine, "image"))
            if case.batch_size > 1:
                entrants.append(Entrant(engine, "mixed"))
    return entrants
