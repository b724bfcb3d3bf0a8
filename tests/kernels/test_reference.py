"""The reference kernels against plainer arithmetic: loops, repeated heads, einsum in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from momaserve.kernels import reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- norms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16)])
def test_rms_norm_is_its_formula(shape: tuple[int, ...]) -> None:
    x, weight = 10 * normal(*shape, seed=1), normal(shape[-1], seed=2)
    wide = x.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(reference.rms_norm(x, weight, 1e-5).double(), wanted, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_nothing_is_nothing() -> None:
    """A token without expert passes a post-order block unchanged only because of this."""
    out = reference.rms_norm(torch.zeros(2, 8), torch.full((8,), 3.0), 1e-5)
    assert torch.equal(out, torch.zeros(2, 8))


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x, weight = normal(4, 64, seed=3).bfloat16(), normal(64, seed=4).bfloat16()
    wanted = reference.rms_norm(x.float(), weight.float(), 1e-5).bfloat16()
    got = reference.rms_norm(x, weight, 1e-5)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, wanted)


def test_head_layer_norm_has_weights_of_its_own_per_head() -> None:
    x = 5 + 3 * normal(4, 3, 6, seed=5)
    weight, bias = normal(3, 6, seed=6), normal(3, 6, seed=7)
    got = reference.head_layer_norm(x, weight, bias)
    for head in range(3):
        wanted = F.layer_norm(x[:, head], (6,), weight[head], bias[head], 1e-5)
        assert_close(got[:, head], wanted)
    assert reference.head_layer_norm(x.bfloat16(), weight, bias).dtype is torch.bfloat16


# --- RoPE ----------------------------------------------------------------------------------


def test_rope_table_holds_the_angles_of_every_position() -> None:
    table = reference.rope_table(50, 6, 10000.0)
    assert table.shape == (50, 2, 3)
    assert table.dtype is torch.float32
    for position in (0, 1, 49):
        for pair in range(3):
            angle = position * 10000.0 ** (-2 * pair / 6)
            assert table[position, 0, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert table[position, 1, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rope_table_is_exact_far_out() -> None:
    """Angles are float64 until the cosine: float32 would be off by 1e-3 here."""
    table = reference.rope_table(100_001, 2, 10000.0)
    assert table[100_000, 0, 0].item() == pytest.approx(math.cos(100_000.0), abs=1e-6)


def test_rope_rotates_the_halves_of_a_head() -> None:
    """Element i turns with element i + K/2 (rotate-half layout)."""
    angles = reference.rope_table(4, 4, 10000.0)[3:]
    cos, sin = angles[0]
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    wanted = [
        1 * cos[0] - 3 * sin[0],
        2 * cos[1] - 4 * sin[1],
        3 * cos[0] + 1 * sin[0],
        4 * cos[1] + 2 * sin[1],
    ]
    assert_close(reference.apply_rope(x, angles)[0, 0], torch.stack(wanted))


def test_rope_depends_on_the_distance_only() -> None:
    table = reference.rope_table(200, 16, 10000.0)
    q, k = normal(1, 2, 16, seed=8), normal(1, 2, 16, seed=9)

    def product(position_q: int, position_k: int) -> Tensor:
        turned_q = reference.apply_rope(q, table[position_q : position_q + 1])
        turned_k = reference.apply_rope(k, table[position_k : position_k + 1])
        return (turned_q * turned_k).sum(-1)

    for shift in (1, 7, 150):
        assert_close(product(40 + shift, 3 + shift), product(40, 3), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(product(41, 3), product(40, 3), atol=1e-3)


def test_rope_keeps_lengths_and_position_zero() -> None:
    table = reference.rope_table(10, 8, 10000.0)
    x = normal(10, 3, 8, seed=10)
    turned = reference.apply_rope(x, table)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0])
    assert reference.apply_rope(x.bfloat16(), table).dtype is torch.bfloat16


# --- auxiliary router ----------------------------------------------------------------------


def test_router_hidden_is_two_layers_in_float32() -> None:
    x, fc1, fc2 = normal(5, 8, seed=11), normal(6, 8, seed=12), normal(3, 6, seed=13)
    hidden = x.double() @ fc1.double().T
    wanted = (hidden * hidden.sigmoid()) @ fc2.double().T
    assert_close(reference.router_hidden(x, fc1, fc2).double(), wanted, rtol=1e-5, atol=1e-5)
    assert reference.router_hidden(x.bfloat16(), fc1, fc2).dtype is torch.float32


# --- expert choice -------------------------------------------------------------------------


def slow_expert_choice(
    logits: list[list[float]],
    eligible: list[bool],
    segments: list[int],
    num_segments: int,
    capacity: float | None,
) -> list[list[bool]]:
    """Model.md, section 4, one expert of one segment at a time."""
    num_experts = len(logits[0]) if logits else 1
    selected = [[False] * num_experts for _ in logits]
    for segment in range(num_segments):
        scope = [t for t in range(len(logits)) if eligible[t] and segments[t] == segment]
        share = len(scope) // num_experts if capacity is None else int(capacity * len(scope))
        for expert in range(num_experts):
            best_first = sorted(scope, key=lambda t: (-logits[t][expert], t))
            for token in best_first[: max(1, share)]:
                selected[token][expert] = True
    return selected


def choose(
    logits: list[list[float]],
    eligible: list[bool] | None = None,
    segments: list[int] | None = None,
    num_segments: int = 1,
    capacity: float | None = None,
) -> list[list[bool]]:
    eligible = [True] * len(logits) if eligible is None else eligible
    segments = [0] * len(logits) if segments is None else segments
    selected = reference.expert_choice(
        torch.tensor(logits).view(len(logits), -1),
        torch.tensor(eligible, dtype=torch.bool),
        torch.tensor(segments, dtype=torch.int64),
        num_segments,
        capacity,
    )
    result: list[list[bool]] = selected.tolist()
    return result


def column(*logits: float) -> list[list[float]]:
    return [[value] for value in logits]


def taken(selected: list[list[bool]], expert: int = 0) -> list[int]:
    return [token for token, row in enumerate(selected) if row[expert]]


def test_each_expert_takes_its_best_share() -> None:
    logits = [[1.0, 0.0], [4.0, 1.0], [2.0, 9.0], [3.0, 8.0]]
    selected = choose(logits)
    assert taken(selected, 0) == [1, 3]
    assert taken(selected, 1) == [2, 3]


def test_ties_go_to_the_lower_token() -> None:
    assert taken(choose(column(5, 5, 5, 5), capacity=0.5)) == [0, 1]
    assert taken(choose(column(1, 5, 5, 5), capacity=0.5)) == [1, 2]


def test_logits_are_ranked_where_sigmoids_are_equal() -> None:
    assert torch.tensor(40.0).sigmoid() == torch.tensor(41.0).sigmoid()
    assert taken(choose(column(40, 41, 40, 42), capacity=0.5)) == [1, 3]


@pytest.mark.parametrize(
    ("num_tokens", "capacity", "count"),
    [(1, 0.25, 1), (3, 0.25, 1), (7, 0.25, 1), (8, 0.25, 2), (10, 0.3, 3), (10, 0.99, 9)],
)
def test_capacity_is_rounded_down_but_never_to_none(
    num_tokens: int, capacity: float, count: int
) -> None:
    selected = choose(column(*range(num_tokens)), capacity=capacity)
    assert taken(selected) == list(range(num_tokens - count, num_tokens))


@pytest.mark.parametrize(("num_tokens", "count"), [(1, 1), (2, 1), (3, 1), (5, 1), (6, 2), (8, 2)])
def test_capacity_none_is_exactly_one_share(num_tokens: int, count: int) -> None:
    selected = choose([[float(t)] * 3 for t in range(num_tokens)])
    for expert in range(3):
        assert len(taken(selected, expert)) == count


def test_a_capacity_of_one_takes_all() -> None:
    assert taken(choose(column(-1, -100, 3), capacity=1.0)) == [0, 1, 2]


def test_segments_do_not_compete() -> None:
    logits = column(9, 8, 7, 6, 1, 2, 3, 4)
    selected = choose(logits, segments=[0, 0, 0, 0, 1, 1, 1, 1], num_segments=2, capacity=0.5)
    assert taken(selected) == [0, 1, 6, 7]


def test_tokens_of_segments_may_be_interleaved() -> None:
    logits = column(1, 5, 2, 6, 3, 7)
    selected = choose(logits, segments=[0, 1, 0, 1, 0, 1], num_segments=2, capacity=0.4)
    assert taken(selected) == [4, 5]


def test_a_segment_may_be_empty() -> None:
    selected = choose(column(1, 2, 3), segments=[0, 2, 2], num_segments=3, capacity=0.5)
    assert taken(selected) == [0, 2]


def test_tokens_outside_every_segment_are_neither_taken_nor_counted() -> None:
    selected = choose(column(9, 8, 1, 2), segments=[-1, -1, 0, 0], capacity=0.5)
    assert taken(selected) == [3]


def test_ineligible_tokens_are_neither_taken_nor_counted() -> None:
    eligible = [False, True, True, False]
    assert taken(choose(column(9, 1, 2, 8), eligible=eligible, capacity=0.5)) == [2]
    assert taken(choose(column(9, 1, 2, 8), eligible=[False] * 4, capacity=0.5)) == []


def test_no_tokens_at_all() -> None:
    empty = torch.zeros(0, dtype=torch.bool)
    selected = reference.expert_choice(
        torch.zeros(0, 4), empty, torch.zeros(0, dtype=torch.int64), 0, None
    )
    assert selected.shape == (0, 4)


@pytest.mark.parametrize("seed", range(4))
def test_expert_choice_against_a_loop(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        num_tokens = rng.choice((1, 2, 3, 7, 16, 33))
        num_experts = rng.choice((1, 2, 3, 4, 8))
        num_segments = rng.randint(0, 4)
        levels = rng.choice((1, 3, 1000))  # few levels make many ties
        logits = [
            [rng.randint(-levels, levels) / 4 for _ in range(num_experts)]
            for _ in range(num_tokens)
        ]
        eligible = [rng.random() < 0.7 for _ in range(num_tokens)]
        segments = [rng.randint(-1, num_segments - 1) for _ in range(num_tokens)]
        capacity = rng.choice((None, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0))
        case = (logits, eligible, segments, num_segments, capacity)
        assert choose(*case) == slow_expert_choice(*case), case


# --- routed experts ------------------------------------------------------------------------


def experts(num_experts: int, hidden: int = 6, inner: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up, down."""
    return (
        normal(num_experts, inner, hidden, seed=21),
        normal(num_experts, inner, hidden, seed=22),
        normal(num_experts, hidden, inner, seed=23),
    )


def dense_experts(u: Tensor, selected: Tensor, weights: Tensor, *parts: Tensor) -> Tensor:
    """Every expert over every token, then the weighted selection; float64."""
    gate, up, down = (part.double() for part in parts)
    u = u.double()
    gated = torch.einsum("td,efd->tef", u, gate)
    hidden = gated * gated.sigmoid() * torch.einsum("td,efd->tef", u, up)
    y = torch.einsum("tef,edf->ted", hidden, down)
    return torch.einsum("ted,te->td", y, selected.double() * weights.double())


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 37])
@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_routed_experts_are_the_dense_sum(
    num_tokens: int, num_experts: int, density: float
) -> None:
    u = normal(num_tokens, 6, seed=24)
    generator = torch.Generator().manual_seed(25)
    selected = torch.rand(num_tokens, num_experts, generator=generator) < density
    weights = normal(num_tokens, num_experts, seed=26).sigmoid()
    parts = experts(num_experts)
    got = reference.routed_experts(u, selected, weights, *parts)
    assert got.dtype is torch.float32
    assert_close(got.double(), dense_experts(u, selected, weights, *parts), rtol=1e-4, atol=1e-4)


def test_a_token_without_expert_gets_exactly_zero() -> None:
    selected = torch.tensor([[False, False], [True, False], [True, True]])
    u = normal(3, 6, seed=27)
    u[0] = float("nan")  # is not even read
    out = reference.routed_experts(u, selected, torch.ones(3, 2), *experts(2))
    assert torch.equal(out[0], torch.zeros(6))
    assert bool((out[1:] != 0).all())


def test_an_expert_without_tokens_is_left_out() -> None:
    selected = torch.zeros(4, 3, dtype=torch.bool)
    selected[:, 1] = True
    u, parts = normal(4, 6, seed=28), experts(3)
    alone = [part[1:2] for part in parts]
    wanted = reference.routed_experts(u, selected[:, 1:2], torch.ones(4, 1), *alone)
    for part in parts:
        part[0] = part[2] = float("nan")
    got = reference.routed_experts(u, selected, torch.ones(4, 3), *parts)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_the_batched_path_equals_the_loop(
    num_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients; a token may have several experts or none."""
    num_tokens, share = 40, 12
    scores = normal(num_tokens, num_experts, seed=29)
    best = scores.topk(share, dim=0).indices
    selected = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(0, best, True)
    wanted_out: Tensor | None = None
    wanted_grads: list[Tensor] = []
    for batched_rows in (num_tokens + 1, 1):  # the loop, then the batched product
        monkeypatch.setattr(reference, "BATCHED_ROWS", batched_rows)
        inputs = [normal(num_tokens, 6, seed=30), scores.sigmoid(), *experts(num_experts)]
        for tensor in inputs:
            tensor.requires_grad_(True)
        u, weights, *parts = inputs
        out = reference.routed_experts(u, selected, weights, *parts)
        out.pow(2).sum().backward()  # type: ignore[no-untyped-call]
        grads = [tensor.grad for tensor in inputs if tensor.grad is not None]
        assert len(grads) == len(inputs)
        if wanted_out is None:
            wanted_out, wanted_grads = out, grads
            continue
        assert_close(out, wanted_out, rtol=1e-5, atol=1e-5)
        for grad, wanted in zip(grads, wanted_grads, strict=True):
            assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_unequal_shares_never_take_the_batched_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BATCHED_ROWS", 1)
    selected = torch.tensor([[True, True], [True, False], [True, True]])
    u, parts = normal(3, 6, seed=31), experts(2)
    got = reference.routed_experts(u, selected, torch.ones(3, 2), *parts)
    wanted = dense_experts(u, selected, torch.ones(3, 2), *parts)
    assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


# --- attention -----------------------------------------------------------------------------


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax by hand over repeated kv heads, float64: q [B, Sq, H, K], mask [B, 1, Sq, Sk]."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(repeat, dim=2) for x in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q.double(), k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqs,bshk->bqhk", weights, v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 9), (8, 8)])
def test_attend_is_softmax_over_repeated_heads(
    heads: int, kv_heads: int, queries: int, keys: int
) -> None:
    q = normal(2, queries, heads, 8, seed=32)
    k, v = normal(2, keys, kv_heads, 8, seed=33), normal(2, keys, kv_heads, 8, seed=34)
    ends = torch.arange(keys - queries, keys).unsqueeze(1)
    mask = (torch.arange(keys) <= ends).expand(2, 1, queries, keys)
    wanted = plain_attention(q, k, v, mask)
    assert_close(reference.attend(q, k, v, mask).double(), wanted, rtol=1e-4, atol=1e-5)
    if queries == keys:
        causal = reference.attend(q, k, v, None, is_causal=True)
        assert_close(causal.double(), wanted, rtol=1e-4, atol=1e-5)


def test_attend_does_not_look_behind_the_mask() -> None:
    q = normal(1, 1, 4, 8, seed=35)
    k, v = normal(1, 6, 2, 8, seed=36), normal(1, 6, 2, 8, seed=37)
    mask = torch.tensor([True, True, False, True, False, False])[None, None, None]
    wanted = reference.attend(q, k, v, mask)
    k[:, [2, 4, 5]] = 1e4
    v[:, [2, 4, 5]] = -1e30
    assert torch.equal(reference.attend(q, k, v, mask), wanted)
