"""`peers`: momaserve and transformers in turn on the nearest shapes, on one GPU."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

from momaserve.config import CacheConfig, EngineConfig, SchedulerConfig
from momaserve.engine import Engine
from momaserve.models.config import ModelConfig
from momaserve.models.presets import preset_config
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt
from momaserve_bench.batch_run import run_batch
from momaserve_bench.engine_setup import preset_parts
from momaserve_bench.gpu.device import Budget, Device
from momaserve_bench.peers.rates import ratios, summary
from momaserve_bench.peers.shapes import peer_config
from momaserve_bench.report import print_table

GIB = 1 << 30
_ALIGNED = 8
"""Hidden units of an expert are a multiple of this in the peer: its kernels need or like that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A shape of ours beside the nearest of the peer's."""

    name: str
    preset: str
    is_compiled: bool
    """Whether the peer compiles a batch of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSizes:
    pairs: tuple[Pair, ...]
    batch_sizes: tuple[int, ...]
    input_len: int
    output_len: int
    rounds: int
    num_warmup: int
    dtype: str
    kv_cache_bytes: int


FULL = PeerSizes(
    pairs=(
        Pair(name="dense", preset="moma-1.4b-dense", is_compiled=True),
        Pair(name="4t4i", preset="moma-1.4b-4t4i", is_compiled=False),
    ),
    batch_sizes=(1, 64),
    input_len=128,
    output_len=64,
    rounds=5,
    num_warmup=2,
    dtype="bfloat16",
    kv_cache_bytes=8 * GIB,
)


class Peer(Protocol):
    name: str
    settings: dict[str, Any]

    def run(self, prompts: list[list[int]], num_new: int) -> float:
        """Decode tokens/s."""
        ...


MakePeer = Callable[[ModelConfig, Pair], Peer]


def compare(
    device: Device,
    budget: Budget,
    *,
    seed: int,
    sizes: PeerSizes = FULL,
    make_ours: Callable[[str, PeerSizes], Engine] | None = None,
    make_peer: MakePeer | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Pair after pair; what the peer could not do is under `missing`, with the reason.

    Args:
        make_ours, make_peer: None takes the preset on the device, and transformers.
        keep: is given what there is after each pair.

    Returns:
        `failed` counts the cases that momaserve itself could not run.
    """
    load = _loader(device) if make_ours is None else make_ours
    make = _maker(device, sizes) if make_peer is None else make_peer
    report: dict[str, Any] = {"pairs": [], "missing": {}, "left_out": [], "failed": 0}
    report["settings"] = {k: v for k, v in asdict(sizes).items() if k != "pairs"}
    for pair in sizes.pairs:
        if budget.is_spent:
            report["left_out"].append(pair.name)
            print(f"left out: {pair.name}, for the {budget.limit_s:g} s of this call were over")
            continue
        _compare(pair, sizes, seed, load, make, budget, report)
        gc.collect()
        keep(report)
    report["peak_bytes"] = device.peak_bytes()
    return report


def _compare(
    pair: Pair,
    sizes: PeerSizes,
    seed: int,
    load: Callable[[str, PeerSizes], Engine],
    make: MakePeer,
    budget: Budget,
    report: dict[str, Any],
) -> None:
    ours = Ours(load(pair.preset, sizes))
    peer: Peer | None = None
    try:
        peer = make(preset_config(pair.preset), pair)
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        report["missing"][pair.name] = _told(error)
    cases: list[dict[str, Any]] = []
    for size in sizes.batch_sizes:
        kinds = ("text", "mixed") if ours.has_own_experts and size > 1 else ("text",)
        runs: dict[str, Callable[[int], float]] = {
            kind: _turn_of_ours(ours, kind, seed, size, sizes) for kind in kinds
        }
        name = f"{pair.name}, batch {size}"
        if budget.is_spent:
            report["left_out"].append(name)
            print(f"left out: {name}, for the {budget.limit_s:g} s of this call were over")
            continue
        if peer is not None:
            runs[peer.name] = _turn_of_peer(peer, ours, seed, size, sizes)
        rates, failures = rounds(runs, sizes)
        for who, reason in failures.items():
            report["failed" if who in kinds else "missing"] = (
                report["failed"] + 1
                if who in kinds
                else report["missing"] | {f"{name}, {who}": reason}
            )
            print(f"{'FAILS' if who in kinds else 'missing'}: {name}, {who}: {reason}")
        cases.append(_case(size, kinds, rates))
    show(pair, cases)
    settings = None if peer is None else peer.settings
    report["pairs"].append(
        {"pair": pair.name, "preset": pair.preset, "peer": settings, "cases": cases}
    )


def rounds(
    runs: Mapping[str, Callable[[int], float]], sizes: PeerSizes
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Everyone once per round, each time another one first; run i has prompts of its own.

    Returns:
        Rates of each round, and the reasons of those that failed, which take no further part.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    names = list(runs)
    for number in range(sizes.num_warmup + sizes.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in failures:
                continue
            try:
                rate = runs[name](number)
            except Exception as error:  # whatever a foreign engine raises
                failures[name] = _told(error)
                continue
            if number >= sizes.num_warmup:
                rates[name].append(rate)
    return {name: found for name, found in rates.items() if name not in failures}, failures


class Ours:
    """An engine of ours, one batch at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        config = engine.model_config
        self.has_own_experts = config.image is not None and len(config.expert_groups) > 1
        self._runs = 0

    def run(self, prompts: list[list[int]], num_new: int, kind: str) -> float:
        """Decode tokens/s of rows of words, or every other of them a picture."""
        self._runs += 1
        submissions = [
            self.engine.make_submission(
                Prompt(tuple(prompt)),
                self._params(num_new, kind == "mixed" and row % 2 == 1, row),
                f"{self._runs}-{row}",
            )
            for row, prompt in enumerate(prompts)
        ]
        times = run_batch(self.engine, submissions)
        return times.num_decode_tokens / times.decode_s

    def _params(self, num_new: int, draws: bool, row: int) -> SamplingParams:
        how = Distribution(temperature=0.0)
        return SamplingParams(
            mode=OutputMode.IMAGE if draws else OutputMode.TEXT,
            max_tokens=num_new + 2 if draws else num_new,  # begin_image and end_image
            text=how,
            image=how,
            ignore_eos=True,
            seed=row,
            cache_salt=f"{self._runs}-{row}",
        )


def _turn_of_ours(
    ours: Ours, kind: str, seed: int, size: int, sizes: PeerSizes
) -> Callable[[int], float]:
    config = ours.engine.model_config
    return lambda number: ours.run(
        _prompts(config, seed, number, size, sizes), sizes.output_len, kind
    )


def _turn_of_peer(
    peer: Peer, ours: Ours, seed: int, size: int, sizes: PeerSizes
) -> Callable[[int], float]:
    config = ours.engine.model_config
    return lambda number: peer.run(_prompts(config, seed, number, size, sizes), sizes.output_len)


def _prompts(
    config: ModelConfig, seed: int, number: int, size: int, sizes: PeerSizes
) -> list[list[int]]:
    """Random words, the same for all that run with this number."""
    rng = random.Random(f"{seed} {size} {number}")
    image = config.image
    first = 3 if image is None else max(image.stop_token_id, image.begin_token_id + 1)
    return [
        [rng.randrange(first, config.vocab_size) for _ in range(sizes.input_len)]
        for _ in range(size)
    ]


def _case(size: int, kinds: Sequence[str], rates: Mapping[str, list[float]]) -> dict[str, Any]:
    """`ratios`: for each kind of rows of ours, its median over each peer's."""
    found = {name: summary(values) for name, values in rates.items()}
    others = {name: one.median for name, one in found.items() if name not in kinds}
    return {
        "batch_size": size,
        "decode_tokens_per_s": {name: asdict(one) for name, one in found.items()},
        "ratios": {kind: ratios(found[kind].median, others) for kind in kinds if kind in found},
    }


def show(pair: Pair, cases: Sequence[dict[str, Any]]) -> None:
    rows: list[tuple[object, ...]] = []
    for case in cases:
        for name, one in case["decode_tokens_per_s"].items():
            mine = case["ratios"].get(name)
            who = f"momaserve, {name}" if mine is not None else name
            ratio = ", ".join(f"{value:.2f}" for value in (mine or {}).values()) or "-"
            spread = f"{one['lowest']:.4g} to {one['highest']:.4g}"
            rows.append((case["batch_size"], who, one["median"], spread, ratio))
    print_table(
        f"{pair.name} ({pair.preset}): decoding, ratio ours over theirs",
        ("batch", "engine", "tok/s", "range", "ratio"),
        rows,
    )


def _loader(device: Device) -> Callable[[str, PeerSizes], Engine]:
    def load(preset: str, sizes: PeerSizes) -> Engine:
        num_requests = max(sizes.batch_sizes)
        config = EngineConfig(
            dtype=sizes.dtype,
            device=device.torch_device.type,
            backend="triton",
            cache=CacheConfig(kv_cache_bytes=sizes.kv_cache_bytes),
            scheduler=SchedulerConfig(
                max_num_requests=num_requests,
                max_num_step_tokens=max(1024, num_requests * sizes.input_len),
            ),
        )
        return Engine(preset_parts(preset, sizes.output_len, config), config)

    return load


def _maker(device: Device, sizes: PeerSizes) -> MakePeer:
    def make(config: ModelConfig, pair: Pair) -> Peer:
        # Found here, so that nothing else needs transformers.
        module = import_module("momaserve_bench.gpu.transformers_peer")
        peer: Peer = module.TransformersPeer(
            nearest(config), device, getattr(torch, sizes.dtype), is_compiled=pair.is_compiled
        )
        return peer

    return make


def nearest(config: ModelConfig) -> dict[str, Any]:
    """`peer_config` with hidden units rounded up to what the peer's kernels take."""
    found = peer_config(config)
    found["intermediate_size"] += -found["intermediate_size"] % _ALIGNED
    return found


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
