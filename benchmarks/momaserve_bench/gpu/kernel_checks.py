"""Every Triton kernel against its twin in torch, on random inputs of sizes that do not divide.

The twins compute in float32 from the same numbers. What a kernel counts or places must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from momaserve.kernels import (
    reference,
    reference_depth,
    reference_experts,
    reference_norms,
    reference_paged,
    reference_routing,
)
from momaserve.kernels.reference_depth import depth_routers
from momaserve.kernels.reference_experts import ExpertWeights
from momaserve.kernels.reference_routing import Pairs
from momaserve.kernels.triton import attention, depth, experts, heads, norms, routing, sampling
from momaserve.kernels.triton.attention_tiles import scratch_shape
from momaserve.modality import Modality
from momaserve_bench.gpu.draws import Draw, draw_error
from momaserve_bench.gpu.findings import TOLERANCE, Check, error_of, num_differing
from momaserve_bench.gpu.inputs import (
    GROUPS,
    Inputs,
    Paged,
    clear_rows,
    make_entry_tables,
    make_paged,
    make_routers,
)

EPS = 1e-5
AFFINITY = 1e-5
"""Of a routing weight, which is float32 whatever the rows are."""
DRAW = 1e-4
"""Of all weights: what the float32 weights of a row's ids may add up to in rounding."""
DRAWS = (
    Draw(temperature=0),
    Draw(),
    Draw(temperature=0.5, min_p=0.1),
    Draw(top_k=1),
    Draw(top_k=7, temperature=2.0),
    Draw(top_k=1000, top_p=0.8),
    Draw(top_p=0.5, temperature=3.0),
    Draw(top_p=0.95, min_p=0.05),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the inputs; what serves is a power of two or has other tiles, so none of these is."""

    width: int
    aux: int
    inner: int
    """Hidden units of an expert."""
    rows: tuple[int, ...]
    """Of routing, experts and depth."""
    heads: tuple[tuple[int, int], ...]
    """Of queries and of keys."""
    head_dims: tuple[int, ...]
    contexts: tuple[int, ...]
    """Lengths of decoding sequences."""
    chunks: tuple[tuple[int, int], ...]
    """(new tokens, length) of the sequences of a step with prompts."""
    splits: tuple[int, ...]
    vocab: int
    groups: tuple[str, ...] = tuple(GROUPS)


FULL = Sizes(
    width=1030,
    aux=515,
    inner=683,
    rows=(1, 3, 4, 5, 61, 127, 300, 1001),  # each way and each set of tiles
    heads=((16, 16), (6, 2)),
    head_dims=(64, 128),
    contexts=(1, 63, 65, 500, 4095),
    chunks=((17, 17), (131, 1000), (1, 40), (0, 0)),
    splits=(1, 3, 17),
    vocab=65521,
)


def kernel_checks(
    seed: int, device: torch.device, dtype: torch.dtype, sizes: Sizes = FULL
) -> Iterator[Check]:
    """All of them; inputs are made when a check is run."""
    maker = _Maker(seed, device, dtype, sizes)
    yield from maker.norms()
    yield from maker.heads()
    yield from maker.attention()
    yield from maker.routing()
    yield from maker.experts()
    yield from maker.depth()
    yield from maker.sampling()


class _Maker:
    """Checks of one seed, device and number format."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self._seed, self._device, self._dtype, self._sizes = seed, device, dtype, sizes
        self._tolerance = TOLERANCE[dtype]

    def _inputs(self, name: str) -> Inputs:
        return Inputs(self._seed, name, self._device, self._dtype)

    def norms(self) -> Iterator[Check]:
        for name in ("rms_norm", "add_normed", "normed_sum"):
            for rows, width in ((1, self._sizes.width), (7, self._sizes.width - 1)):
                what = f"{rows} rows of {width}"
                error = partial(self._norm, name, what, rows, width)
                yield Check(f"norms.{name}", what, self._tolerance, error)

    def _norm(self, name: str, what: str, rows: int, width: int) -> float:
        inputs = self._inputs(f"{name} {what}")
        count = 1 if name == "rms_norm" else 2
        tensors = [inputs.normal(rows, width) for _ in range(count)]
        weight = inputs.normal(width)
        got = getattr(norms, name)(*tensors, weight, EPS)
        # The twin stores what the kernel stores, so a sum is rounded before it is normed.
        wanted = getattr(reference_norms, name)(*tensors, weight, EPS)
        pairs = zip(got, wanted, strict=True) if name == "normed_sum" else [(got, wanted)]
        return max(error_of(one, other) for one, other in pairs)

    def heads(self) -> Iterator[Check]:
        for num_heads, num_kv_heads in self._sizes.heads:
            for head_dim in self._sizes.head_dims:
                for normed in (True, False):
                    what = f"{num_heads}/{num_kv_heads} heads of {head_dim}"
                    what += ", normed" if normed else ""
                    error = partial(self._heads, what, num_heads, num_kv_heads, head_dim, normed)
                    yield Check("heads.place_heads", what, self._tolerance, error)

    def _heads(
        self, what: str, num_heads: int, num_kv_heads: int, head_dim: int, normed: bool
    ) -> float:
        inputs = self._inputs(f"heads {what}")
        rows, num_slots, positions = 13, 50, 40
        slots = torch.tensor(inputs.order(num_slots - 5)[:rows], dtype=torch.int32)
        slots[3] = -1
        count = num_heads + num_kv_heads
        gain = (inputs.normal(count, head_dim), inputs.normal(count, head_dim))
        weight, bias = gain if normed else (None, None)
        table = reference.rope_table(positions, head_dim, 10000.0).to(self._device)
        qkv = inputs.normal(rows, (count + num_kv_heads) * head_dim)
        places = inputs.integers(0, positions, rows)
        before = inputs.normal(num_slots, num_kv_heads, head_dim)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for function in (heads.place_heads, reference_paged.place_heads):
            keys, values = before.clone(), before.clone()
            q = function(
                qkv, weight, bias, table, places, slots.to(self._device), keys, values,
                layer_offset=5,
            )  # fmt: skip
            found.append((q, keys, values))
        return max(error_of(got, wanted) for got, wanted in zip(*found, strict=True))

    def attention(self) -> Iterator[Check]:
        sizes = self._sizes
        for num_heads in sizes.heads:
            for head_dim in sizes.head_dims:
                for density in (None, 0.3):
                    name = f"{num_heads[0]}/{num_heads[1]} heads of {head_dim}"
                    name += "" if density is None else ", depth-routed"
                    options: dict[str, Any] = {
                        "heads": num_heads,
                        "head_dim": head_dim,
                        "density": density,
                    }
                    decodes = ([1] * len(sizes.contexts) + [0], [*sizes.contexts, 0])
                    for splits in sizes.splits:
                        what = f"decoding, {splits} splits, {name}"
                        error = partial(self._attend, what, *decodes, splits, options)
                        yield Check("attention.paged_attention", what, self._tolerance, error)
                    what = f"prompts, {name}"
                    chunks = [list(part) for part in zip(*sizes.chunks, strict=True)]
                    error = partial(self._attend, what, chunks[0], chunks[1], 1, options)
                    yield Check("attention.paged_attention", what, self._tolerance, error)

    def _attend(
        self,
        what: str,
        num_queries: Sequence[int],
        lengths: Sequence[int],
        splits: int,
        options: dict[str, Any],
    ) -> float:
        inputs = self._inputs(f"attention {what}")
        paged = make_paged(inputs, num_queries, lengths, block_size=16, padding_rows=2, **options)
        _, num_heads, head_dim = paged.q.shape
        shape = scratch_shape(splits, len(lengths), num_heads, head_dim)
        scratch = torch.full(shape, math.nan, device=self._device)
        got = _attention(attention.paged_attention, paged, scratch=scratch)
        wide = replace(
            paged, q=paged.q.float(), keys=paged.keys.float(), values=paged.values.float()
        )
        with sdpa_kernel(SDPBackend.MATH):
            wanted = _attention(reference_paged.paged_attention, wide)
        return error_of(got, wanted)

    def routing(self) -> Iterator[Check]:
        for number, groups in enumerate(self._sizes.groups):
            # A wide first layer takes another product; one group of experts shows it.
            stored = dict.fromkeys((self._dtype, torch.float32) if not number else (self._dtype,))
            for rows in self._sizes.rows:
                for one in stored:
                    what = f"{groups}, {rows} rows, first layer in {_name(one)}"
                    error = partial(self._route, what, groups, rows, one)
                    yield Check("routing.route", what, AFFINITY, error)

    def _route(self, what: str, groups: str, rows: int, stored: torch.dtype) -> float:
        inputs, sizes = self._inputs(f"routing {what}"), self._sizes
        routers = make_routers(inputs, groups, sizes.width, sizes.aux, stored)
        u = clear_rows(inputs, rows, routers)
        modality = inputs.integers(-1, 2, rows, dtype=torch.int8)
        policy = inputs.integers(0, 4, rows, dtype=torch.int8)
        taken = inputs.integers(0, 4, rows) > 0
        chosen = inputs.integers(0, 2, rows, routers.num_experts) > 0
        got, wanted = (
            function(u, modality, policy, routers, taken=taken, chosen=chosen)
            for function in (routing.route, reference_routing.route)
        )
        count = int(wanted.offsets[-1])
        if num_differing(got.offsets, wanted.offsets) + num_differing(got.places, wanted.places):
            return math.inf
        if num_differing(got.tokens[:count], wanted.tokens[:count]):
            return math.inf
        return error_of(got.weights[:count], wanted.weights[:count])

    def experts(self) -> Iterator[Check]:
        for rows in self._sizes.rows:
            way = "direct" if experts.use_direct(rows) else "grouped"
            what = f"{way}, {rows} rows of {self._sizes.width}"
            error = partial(self._experts, what, rows, self._sizes.width)
            yield Check("experts.experts", what, self._tolerance, error)

    def _experts(self, what: str, rows: int, width: int) -> float:
        """Two sizes of experts over one list of pairs; the fourth of the first has none."""
        inputs = self._inputs(f"experts {what}")
        weights = [
            self._expert_weights(inputs, count, width, inner, first)
            for count, inner, first in ((4, self._sizes.inner, 0), (2, self._sizes.inner // 2, 4))
        ]
        selected = inputs.integers(0, 3, rows, 6) == 0
        selected[:, 3] = False
        selected[0, 0] = True
        pairs = Pairs.of(selected, inputs.uniform(rows, 6).float(), 6, None)
        u = inputs.normal(rows, width)
        got = experts.experts(u, pairs, weights[0])
        experts.experts(u, pairs, weights[1], out=got, accumulate=True)
        wide = [_widened(one) for one in weights]
        wanted = reference_experts.experts(u.float(), pairs, wide[0])
        reference_experts.experts(u.float(), pairs, wide[1], out=wanted, accumulate=True)
        return error_of(got, wanted)

    @staticmethod
    def _expert_weights(
        inputs: Inputs, count: int, width: int, inner: int, first: int
    ) -> ExpertWeights:
        return ExpertWeights.padded(
            inputs.normal(count, inner, width) / width**0.5,
            inputs.normal(count, inner, width) / width**0.5,
            inputs.normal(count, width, inner) / inner**0.5,
            first=first,
        )

    def depth(self) -> Iterator[Check]:
        for rows in self._sizes.rows:
            what = f"{rows} rows"
            yield Check("depth.take", what, AFFINITY, partial(self._take, what, rows))
            yield Check("depth.gather", what, 0.0, partial(self._gather, what, rows))
            yield Check("depth.blend", what, self._tolerance, partial(self._blend, what, rows))

    def _take(self, what: str, rows: int) -> float:
        inputs, sizes = self._inputs(f"take {what}"), self._sizes
        wide = torch.float32
        routers = depth_routers(
            inputs.normal(1, sizes.width, dtype=wide) / sizes.width**0.5,
            inputs.normal(sizes.aux, sizes.width) / sizes.width**0.5,
            inputs.normal(1, sizes.aux, dtype=wide) / sizes.aux**0.5,
            inputs.normal(1, dtype=wide),
            tuple(Modality),
        )
        padding = rows // 4
        lengths = _lengths(rows - padding)
        starts = [5 * number % 37 for number in range(len(lengths))]
        tables = make_entry_tables(inputs, lengths, starts, padding, block_size=16, block_stride=48)
        twin_tables = deepcopy(tables)
        x = clear_rows(inputs, rows, routers)
        modality = inputs.integers(0, 2, rows, dtype=torch.int8)
        modality[rows - padding :] = -1
        policy = inputs.integers(0, 4, rows, dtype=torch.int8)
        chosen = inputs.integers(0, 2, rows, 1) > 0
        got = depth.take(x, modality, policy, routers, tables, chosen=chosen)
        wanted = reference_depth.take(x, modality, policy, routers, twin_tables, chosen=chosen)
        differing = sum(
            num_differing(getattr(got, name), getattr(wanted, name))
            for name in ("taken", "slots", "rows", "places", "count")
        )
        differing += num_differing(tables.num_entries, twin_tables.num_entries)
        differing += num_differing(tables.index, twin_tables.index)
        return math.inf if differing else error_of(got.weight, wanted.weight)

    def _gather(self, what: str, rows: int) -> float:
        inputs = self._inputs(f"gather {what}")
        x = inputs.normal(rows + 3, self._sizes.width)
        which = inputs.integers(-1, rows + 3, rows)
        return num_differing(depth.gather(x, which), reference_depth.gather(x, which))

    def _blend(self, what: str, rows: int) -> float:
        inputs = self._inputs(f"blend {what}")
        x, block = (inputs.normal(count, self._sizes.width) for count in (rows, rows + 1))
        weight = inputs.uniform(rows).float()
        weight[0] = 1.0
        places = inputs.integers(-1, rows + 1, rows)
        got = depth.blend(x, block, weight, places)
        return error_of(got, reference_depth.blend(x.float(), block.float(), weight, places))

    def sampling(self) -> Iterator[Check]:
        for levels in (None, 4):
            what = f"{len(DRAWS)} ways, {self._sizes.vocab} ids"
            what += "" if levels is None else ", most of them tied"
            yield Check("sampling.draw", what, DRAW, partial(self._draw, what, levels))
        what = f"{len(DRAWS) - 1} ways, without bias"
        yield Check("sampling.draw", what, DRAW, partial(self._draw, what, None, has_bias=False))

    def _draw(self, what: str, levels: int | None, *, has_bias: bool = True) -> float:
        inputs, vocab = self._inputs(f"sampling {what}"), self._sizes.vocab
        ways = DRAWS if has_bias else DRAWS[1:]  # a number that no four divide
        count = len(ways)
        wide = torch.float32
        logits = 3 * inputs.normal(count, vocab, dtype=wide)
        if levels is not None:
            logits = (logits / 3 * levels / 2).round()
        masks = inputs.integers(0, 4, 2, vocab) > 0
        masks[:, 0] = True
        choices = inputs.integers(0, 2, count)
        bias = inputs.normal(count, vocab, dtype=wide).round() if has_bias else None
        uniforms = inputs.uniform(count)

        def column(name: str, dtype: torch.dtype) -> Tensor:
            values = [getattr(draw, name) for draw in ways]
            return torch.tensor(values, dtype=dtype, device=self._device)

        token_ids, is_finite = sampling.draw(
            logits, masks, choices, column("temperature", torch.float64),
            column("top_k", torch.int32), column("top_p", torch.float64),
            column("min_p", torch.float64), uniforms, bias=bias,
        )  # fmt: skip
        if not bool(is_finite.all()):
            return math.inf
        scores = (logits if bias is None else logits + bias).masked_fill(
            ~masks[choices.long()], -math.inf
        )
        return max(
            draw_error(scores[row], draw, float(uniforms[row]), int(token_ids[row]))
            for row, draw in enumerate(ways)
        )


def _attention(function: Any, paged: Paged, **options: Any) -> Tensor:
    found: Tensor = function(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.seq_lens,
        paged.cu_seqlens_q,
        block_size=paged.block_size,
        block_stride=paged.block_stride,
        layer_offset=paged.layer_offset,
        index=paged.index,
        max_q=paged.max_q,
        max_len=paged.max_len,
        **options,
    )
    return found


def _widened(weights: ExpertWeights) -> ExpertWeights:
    return replace(
        weights, gate=weights.gate.float(), up=weights.up.float(), down=weights.down.float()
    )


def _lengths(rows: int) -> list[int]:
    """Sequences of a step: a chunk of more than half of the rows, then ever shorter ones."""
    lengths: list[int] = []
    while rows:
        lengths.append(rows // 2 + 1)
        rows -= lengths[-1]
    return lengths


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
