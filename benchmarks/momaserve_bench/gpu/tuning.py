"""`tune`: which tile sizes are quickest on this GPU, out of small sets that stand here.

Changes nothing: what it finds is for the tables in `momaserve/kernels/triton`. Each size is varied
by itself, in the order of its set, from what the table has; another value is kept if it is quicker
by more than `MARGIN`, and only if it computes the same. Where torch has an operator for the same
work, its time stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.kernels.reference_experts import ExpertWeights
from momaserve.kernels.reference_routing import Pairs
from momaserve.kernels.triton import attention, attention_tiles, experts
from momaserve_bench.gpu.device import Budget, Device, time_on
from momaserve_bench.gpu.findings import line_of
from momaserve_bench.gpu.inputs import Inputs, Paged, make_paged
from momaserve_bench.report import print_table

Tiles = TypeVar("Tiles", experts.DirectTiles, experts.GroupedTiles, attention_tiles.Tiles)
Choices = Mapping[str, tuple[int, ...]]

MARGIN = 0.03
"""Share of the time that another value must save."""
TOLERANCE = 2e-2
"""Of results in half the digits, against those of the table's sizes, over the largest."""
DIRECT: Choices = {
    "up_outputs": (2, 4, 8),
    "up_depth": (512, 1024, 2048),
    "up_warps": (2, 4, 8),
    "down_outputs": (1, 2, 4),
    "down_depth": (1024, 2048, 4096),
    "down_warps": (2, 4, 8),
}
GROUPED: Choices = {
    "rows": (16, 32, 64, 128),
    "up_outputs": (32, 64, 128),
    "up_depth": (32, 64, 128),
    "up_warps": (4, 8),
    "up_stages": (2, 3, 4, 5),
    "down_outputs": (32, 64, 128),
    "down_depth": (32, 64, 128),
    "down_warps": (4, 8),
    "down_stages": (2, 3, 4, 5),
    "shares": (1, 2, 4, 8),
}
DECODE: Choices = {
    "positions": (16, 32, 64),
    "warps": (1, 2, 4),
    "stages": (2, 3, 4, 5),
    "resident": (4, 8, 16, 32),
}
PREFILL: Choices = {
    "rows": (32, 64, 128),
    "positions": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSizes:
    """Of the work that tiles are tried on: that of `moma-1.4b-4t4i`."""

    dtype: str
    width: int
    inner: int
    """Hidden units of an expert."""
    num_experts: int
    num_layers: int
    """Whose weights, or K/V, take turns, so that none is in a cache."""
    heads: tuple[int, int]
    head_dim: int
    block_size: int
    works: tuple[tuple[str, int, int], ...]
    """What tiles are searched for, the most important first: ("direct" or "grouped", rows, 1) of
    experts, ("decoding" or "prompts", sequences, positions of each) of attention."""
    num_runs: int
    num_warmup: int
    inner_runs: int


FULL = TuningSizes(
    dtype="bfloat16",
    width=2048,
    inner=5461,
    num_experts=8,
    num_layers=3,
    heads=(16, 16),
    head_dim=128,
    block_size=16,
    works=(
        ("direct", 1, 1),
        ("decoding", 32, 4096),
        ("grouped", 64, 1),
        ("grouped", 16384, 1),
        ("prompts", 8, 2048),
        ("decoding", 1, 4096),
        ("grouped", 8, 1),
        ("grouped", 512, 1),
        ("direct", 4, 1),
        ("grouped", 128, 1),
    ),
    num_runs=5,
    num_warmup=2,
    inner_runs=20,
)


@dataclass(slots=True)
class Search(Generic[Tiles]):
    """One piece of work, its table's tiles, and what was tried."""

    tiles: Tiles
    choices: Choices
    measure: Callable[[Tiles], float]
    """Seconds; raises where the tiles cannot run or compute something else."""
    tried: dict[str, float | str] = field(default_factory=dict)
    """Microseconds, or why there are none, by what differs from the best before."""

    def run(self, budget: Budget) -> dict[str, Any]:
        """Tries one value after another; what the table has must run."""
        first = self.tiles
        before = best = self.measure(first)
        self.tried["as it is"] = 1e6 * before
        for name, values in self.choices.items():
            for value in values:
                other = replace(self.tiles, **{name: value})
                if value == getattr(self.tiles, name) or budget.is_spent:
                    continue
                seconds = self._try(f"{name} {value}", other)
                if seconds < (1 - MARGIN) * best:
                    best, self.tiles = seconds, other
        return {
            "before_us": 1e6 * before,
            "best_us": 1e6 * best,
            "ratio": before / best,
            "before": repr(first),
            "best": repr(self.tiles),
            "tried": self.tried,
        }

    def _try(self, name: str, tiles: Tiles) -> float:
        try:
            seconds = self.measure(tiles)
        except Exception as error:  # too much shared memory, a compiler's limit, a wrong result
            self.tried[name] = line_of(error)
            return math.inf
        self.tried[name] = 1e6 * seconds
        return seconds


class OtherResultError(Exception):
    """Tiles changed what is computed."""


def tune(
    device: Device,
    budget: Budget,
    *,
    seed: int,
    sizes: TuningSizes = FULL,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Searches one kind of work after another and prints what it found.

    Args:
        keep: is given what there is after each search.

    Returns:
        By work; `left_out` names that for which no time was left, `failures` that whose tiles of
        today fail, with the reason.
    """
    maker = _Maker(device, seed, sizes)
    report: dict[str, Any] = {"searches": {}, "left_out": [], "failures": {}}
    for what, make in maker.searches():
        if budget.is_spent:
            report["left_out"].append(what)
            continue
        try:
            with torch.inference_mode():
                search = make()
                report["searches"][what] = search.run(budget) | maker.beside(what)
        except Exception as error:
            report["failures"][what] = line_of(error)
        keep(report)
    _show(report)
    return report


def _show(report: dict[str, Any]) -> None:
    print_table(
        "tiles, microseconds; medians",
        ("work", "as it is", "best", "ratio", "torch", "best tiles"),
        [
            (
                what,
                found["before_us"],
                found["best_us"],
                found["ratio"],
                found.get("torch_us", "-"),
                found["best"] if found["best"] != found["before"] else "as it is",
            )
            for what, found in report["searches"].items()
        ],
    )
    for what, reason in report["failures"].items():
        print(f"FAILS: {what}: {reason}")
    for what in report["left_out"]:
        print(f"left out: {what}, for the time of this call was over")


class _Maker:
    def __init__(self, device: Device, seed: int, sizes: TuningSizes) -> None:
        self._device, self._seed, self._sizes = device, seed, sizes
        self._weights: list[ExpertWeights] = []
        self._beside: dict[str, float] = {}

    def searches(self) -> Iterator[tuple[str, Callable[[], Search[Any]]]]:
        kinds = {
            "direct": self._direct,
            "grouped": self._grouped,
            "decoding": self._decode,
            "prompts": self._prefill,
        }
        for kind, count, length in self._sizes.works:
            what = f"{kind}, {count}" + (f" x {length}" if length > 1 else " rows")
            yield what, partial(kinds[kind], what, count, length)

    def beside(self, what: str) -> dict[str, float]:
        """What torch's own operator took for the same work, where it has one."""
        return {"torch_us": self._beside[what]} if what in self._beside else {}

    def _inputs(self, name: str) -> Inputs:
        dtype: torch.dtype = getattr(torch, self._sizes.dtype)
        return Inputs(self._seed, name, self._device.torch_device, dtype)

    def _time(self, work: Callable[[int], object]) -> float:
        """Seconds of one call, which is given the number of its turn."""
        sizes, turn = self._sizes, 0

        def one() -> None:
            nonlocal turn
            turn += 1
            work(turn % sizes.num_layers)

        return time_on(
            self._device,
            one,
            num_runs=sizes.num_runs,
            num_warmup=sizes.num_warmup,
            inner=sizes.inner_runs,
        ).median_s

    def _layers(self) -> list[ExpertWeights]:
        if not self._weights:
            inputs, sizes = self._inputs("weights"), self._sizes
            self._weights = [
                ExpertWeights.padded(
                    *(
                        inputs.normal(sizes.num_experts, *shape) / shape[1] ** 0.5
                        for shape in (
                            (sizes.inner, sizes.width),
                            (sizes.inner, sizes.width),
                            (sizes.width, sizes.inner),
                        )
                    )
                )
                for _ in range(sizes.num_layers)
            ]
        return self._weights

    def _pairs(self, rows: int) -> tuple[Tensor, Pairs]:
        """Rows with one expert each, as even as they come out."""
        inputs, count = self._inputs(f"pairs {rows}"), self._sizes.num_experts
        chosen = inputs.integers(0, count, rows, dtype=torch.int64)
        selected = F.one_hot(chosen, count) > 0
        weights = inputs.uniform(rows, count).float()
        # Half of a step's experts may take the same token: so much room have the lists.
        return inputs.normal(rows, self._sizes.width), Pairs.of(
            selected, weights, max(1, count // 2), None
        )

    def _direct(self, what: str, rows: int, _: int) -> Search[Any]:
        u, pairs = self._pairs(rows)
        tiles = experts.direct_tiles_for(rows)
        return self._expert_search(u, pairs, experts.direct, tiles, DIRECT)

    def _grouped(self, what: str, rows: int, _: int) -> Search[Any]:
        u, pairs = self._pairs(rows)
        self._compare(what, u, pairs)
        tiles = experts.grouped_tiles_for(rows)
        return self._expert_search(u, pairs, experts.grouped, tiles, GROUPED)

    def _expert_search(
        self,
        u: Tensor,
        pairs: Pairs,
        way: Callable[..., Tensor],
        tiles: Any,
        choices: Choices,
    ) -> Search[Any]:
        layers, out = self._layers(), torch.empty(u.shape, device=u.device)
        wanted = way(u, pairs, layers[0], tiles, out, False).clone()

        def measure(tried: Any) -> float:
            out.fill_(math.nan)
            _same(way(u, pairs, layers[0], tried, out, False), wanted)
            return self._time(lambda layer: way(u, pairs, layers[layer], tried, out, False))

        return Search(tiles, choices, measure)

    def _compare(self, what: str, u: Tensor, pairs: Pairs) -> None:
        """Times torch's grouped products on the same rows, if this torch has them."""
        operator = getattr(F, "grouped_mm", None)
        if operator is None:
            return
        layers, count = self._layers(), int(pairs.offsets[-1])
        tokens, ends = pairs.tokens[:count].long(), pairs.offsets[1:].contiguous()
        weights = pairs.weights[:count].unsqueeze(1)

        def work(layer: int) -> Tensor:
            one, rows = layers[layer], u[tokens]
            gate = operator(rows, one.gate.transpose(1, 2), offs=ends)
            hidden = F.silu(gate) * operator(rows, one.up.transpose(1, 2), offs=ends)
            found = operator(hidden, one.down.transpose(1, 2), offs=ends)
            out = torch.zeros(u.shape, device=u.device)
            return out.index_add_(0, tokens, found.float() * weights)

        try:
            tiles = experts.grouped_tiles_for(len(u))
            out = torch.empty(u.shape, device=u.device)
            _same(work(0), experts.grouped(u, pairs, layers[0], tiles, out, False))
            self._beside[what] = 1e6 * self._time(work)
        except Exception as error:  # an operator for other cards or formats
            print(f"no grouped_mm for {what}: {type(error).__name__}")

    def _decode(self, what: str, batch: int, length: int) -> Search[attention_tiles.Tiles]:
        num_heads, num_kv_heads = self._sizes.heads
        processors = self._device.num_multiprocessors

        def scratch(tiles: attention_tiles.Tiles) -> Tensor:
            splits = attention_tiles.num_splits(batch, num_kv_heads, length, processors, tiles)
            shape = attention_tiles.scratch_shape(splits, batch, num_heads, self._sizes.head_dim)
            return torch.empty(shape, device=self._device.torch_device)

        paged = self._paged([1] * batch, [length] * batch)
        tiles = attention_tiles.decode_tiles(
            num_heads // num_kv_heads, self._sizes.head_dim, paged.q.element_size()
        )
        return self._attention_search(paged, tiles, DECODE, scratch)

    def _prefill(self, what: str, batch: int, length: int) -> Search[attention_tiles.Tiles]:
        num_heads, num_kv_heads = self._sizes.heads
        paged = self._paged([length] * batch, [length] * batch)
        tiles = attention_tiles.prefill_tiles(
            length, num_heads // num_kv_heads, self._sizes.head_dim, paged.q.element_size()
        )
        return self._attention_search(paged, tiles, PREFILL, lambda _: None)

    def _paged(self, num_queries: Sequence[int], seq_lens: Sequence[int]) -> Paged:
        sizes = self._sizes
        return make_paged(
            self._inputs(f"attention {len(seq_lens)} {seq_lens[0]}"),
            num_queries,
            seq_lens,
            heads=sizes.heads,
            head_dim=sizes.head_dim,
            block_size=sizes.block_size,
        )

    def _attention_search(
        self,
        paged: Paged,
        tiles: attention_tiles.Tiles,
        choices: Choices,
        scratch: Callable[[attention_tiles.Tiles], Tensor | None],
    ) -> Search[attention_tiles.Tiles]:
        copies = [paged] + [
            replace(paged, keys=paged.keys.clone(), values=paged.values.clone())
            for _ in range(self._sizes.num_layers - 1)
        ]

        def attend(layer: int, tried: attention_tiles.Tiles, parts: Tensor | None) -> Tensor:
            one = copies[layer]
            return attention.paged_attention(
                one.q, one.keys, one.values, one.block_tables, one.seq_lens, one.cu_seqlens_q,
                block_size=one.block_size, block_stride=one.block_stride,
                layer_offset=one.layer_offset, max_q=one.max_q, max_len=one.max_len,
                scratch=parts, tiles=tried,
            )  # fmt: skip

        wanted = attend(0, tiles, scratch(tiles))

        def measure(tried: attention_tiles.Tiles) -> float:
            parts = scratch(tried)
            _same(attend(0, tried, parts), wanted)
            return self._time(lambda layer: attend(layer, tried, parts))

        return Search(tiles, choices, measure)


def _same(got: Tensor, wanted: Tensor) -> None:
    """Raises OtherResultError where tiles changed more than the order of sums."""
    largest = float(wanted.abs().max())
    error = float((got.float() - wanted.float()).abs().max()) / max(largest, 1e-30)
    if not error <= TOLERANCE:
        raise OtherResultError(f"differs by {error:.2g} of the largest value")
