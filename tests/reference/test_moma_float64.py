"""The reference against what can be worked out by hand, so that it may judge the engine."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.reference import moma_float64 as moma
from tests.reference.checkpoints import (
    CASES,
    DENSE,
    FOUR_FOUR,
    IMAGE,
    MOE_8X,
    ONE_ONE,
    expert_group,
    random_checkpoint,
    sample_ids,
)

BEGIN, END = IMAGE["begin_token_id"], IMAGE["end_token_id"]
TWO = [expert_group("all", "text image", 2, 12)]


def make(tmp_path: Path, seed: int = 1, **options: Any) -> tuple[moma.Config, moma.Weights]:
    random_checkpoint(tmp_path, seed=seed, **options)
    return moma.load_checkpoint(tmp_path)


def selections(
    config: moma.Config, weights: moma.Weights, ids: list[int], policy: moma.Policy, **scope: Any
) -> dict[str, moma.Decision]:
    trace: list[moma.Decision] = []
    moma.forward(config, weights, ids, policy, trace=trace, **scope)
    return {decision.router: decision for decision in trace}


def set_logits(weights: moma.Weights, name: str, logits: dict[int, list[float]]) -> None:
    """Make layer 0's main router `name` read its E logits straight off a token's embedding.

    For an expert router that needs post norm order and `silence_attention`; a depth router reads
    the embedding anyway. Tokens not named score -1.
    """
    embed = weights["model.embed_tokens.weight"]
    num_experts = len(next(iter(logits.values())))
    embed[:, :num_experts] = -1.0
    for token, row in logits.items():
        embed[token, :num_experts] = row
    router = weights[f"{name}.weight"]
    router[:] = np.eye(num_experts, router.shape[1])


def silence_attention(weights: moma.Weights) -> None:
    for name, weight in weights.items():
        if name.endswith("o_proj.weight"):
            weight[:] = 0.0


def always(weights: moma.Weights, selected: bool) -> None:
    """Set every threshold so that `calibrated` selects all, or nothing."""
    for name, weight in weights.items():
        if name.endswith("threshold"):
            weight[:] = 0.0 if selected else 1.0


def depth_of(layers: list[int], capacity: float | list[float], **more: Any) -> dict[str, Any]:
    return {"layers": layers, "capacity": capacity, "aux_hidden_size": 16, **more}


# ------------------------------------------------------------------------------------ formulas


def test_rms_norm_by_hand_and_of_zero() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    normed = moma.rms_norm(x, np.array([1.0, 10.0]), 0.5)
    assert_allclose(normed, [[3 / math.sqrt(13), 40 / math.sqrt(13)], [0.0, 0.0]])


def test_layer_norm_by_hand() -> None:
    assert_allclose(moma.layer_norm(np.array([1.0, 3.0])), np.array([-1, 1]) / math.sqrt(1 + 1e-5))


def test_sigmoid_does_not_overflow_and_silu_follows() -> None:
    z = np.array([-800.0, 0.0, math.log(3.0), 800.0])
    assert_allclose(moma.sigmoid(z), [0.0, 0.5, 0.75, 1.0], atol=1e-300)
    assert_allclose(moma.silu(z), [0.0, 0.0, 0.75 * math.log(3.0), 800.0], atol=1e-300)


def test_rope_rotates_halves_by_hand() -> None:
    x = np.array([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 4)  # pairs (0, 2) and (1, 3)
    turned = moma.rope(x, np.array([3]), 100.0)[0, 0]  # frequencies 1 and 100^(-1/2) = 0.1
    expected = [math.cos(3), 2 * math.cos(0.3), math.sin(3), 2 * math.sin(0.3)]
    assert_allclose(turned, expected, rtol=1e-12)


def test_rope_scores_depend_on_distance_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 3, 8))

    def score(at: int, key_at: int) -> moma.FloatArray:
        turned = moma.rope(q, np.array([at]), 1e4) * moma.rope(k, np.array([key_at]), 1e4)
        result: moma.FloatArray = turned.sum(axis=-1)
        return result

    assert_allclose(score(7, 2), score(105, 100), rtol=1e-10)
    assert abs(score(7, 2) - score(7, 3)).max() > 1e-3


def test_log_probs_sum_to_one_and_token_log_probs_read_the_row_before(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=FOUR_FOUR)
    ids = sample_ids(config, 3)
    table = moma.log_probs(moma.forward(config, weights, ids))
    assert_allclose(np.exp(table).sum(axis=1), 1.0)
    entries = moma.token_log_probs(config, weights, ids)
    assert entries[0] is None
    assert entries[1:] == [table[t - 1, ids[t]] for t in range(1, len(ids))]


# ---------------------------------------------------------------------------------- the blocks


@pytest.mark.parametrize("norm_order", ["post", "pre"])
def test_silent_sublayers_leave_embedding_and_head(tmp_path: Path, norm_order: str) -> None:
    config, weights = make(tmp_path, groups=ONE_ONE, norm_order=norm_order)
    silence_attention(weights)
    for name in weights:
        if name.endswith("down_proj"):
            weights[name][:] = 0.0
    ids = sample_ids(config, 3)
    x = weights["model.embed_tokens.weight"][ids]
    expected = moma.rms_norm(x, weights["model.norm.weight"], 1e-5) @ weights["lm_head.weight"].T
    assert_allclose(moma.forward(config, weights, ids), expected, rtol=1e-12)


@pytest.mark.parametrize("depth_logit", [None, 0.0, math.log(3.0)])
@pytest.mark.parametrize("norm_order", ["post", "pre"])
def test_one_token_by_hand(tmp_path: Path, norm_order: str, depth_logit: float | None) -> None:
    """A lone token attends to itself alone: attention is o(v), whatever q and k are.

    A depth router that takes it scales what attention and FFN add together, once.
    """
    depth = None if depth_logit is None else depth_of([0], 0.5)
    config, w = make(tmp_path, groups=DENSE, norm_order=norm_order, layers=1, depth=depth)
    always(w, True)
    x = w["model.embed_tokens.weight"][7]
    v, o = (w[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "vo")
    gate, up, down = (w[f"model.layers.0.experts.all.{p}_proj"][0] for p in ("gate", "up", "down"))

    def norm(name: str, value: moma.FloatArray) -> moma.FloatArray:
        result: moma.FloatArray = w[name] * value / np.sqrt((value**2).mean() + 1e-5)
        return result

    def expert(u: moma.FloatArray) -> moma.FloatArray:
        g = gate @ u
        result: moma.FloatArray = down @ (g / (1 + np.exp(-g)) * (up @ u))
        return result

    attn_norm, ffn_norm = (f"model.layers.0.{part}_norm.weight" for part in ("attn", "ffn"))
    if norm_order == "post":
        h = x + norm(attn_norm, o @ v @ x)
        y = h + norm(ffn_norm, expert(h))
    else:
        h = x + o @ v @ norm(attn_norm, x)
        y = h + expert(norm(ffn_norm, h))
    if depth_logit is not None:
        w["model.layers.0.depth_router.weight"][:] = depth_logit * x / (x @ x)
        y = x + 1 / (1 + math.exp(-depth_logit)) * (y - x)
    expected = w["lm_head.weight"] @ norm("model.norm.weight", y)
    assert_allclose(moma.forward(config, w, [7], "calibrated")[0], expected, rtol=1e-10)


def test_two_tokens_attend_by_hand(tmp_path: Path) -> None:
    """RoPE as a complex product, and a softmax of two scores as one sigmoid."""
    config, w = make(tmp_path, groups=DENSE, norm_order="pre", layers=1, qk_norm=False)
    w["model.layers.0.experts.all.down_proj"][:] = 0.0
    x = w["model.embed_tokens.weight"][[30, 31]]
    u = moma.rms_norm(x, w["model.layers.0.attn_norm.weight"], 1e-5)
    q, k, v = (
        (u @ w[f"model.layers.0.self_attn.{part}_proj.weight"].T).reshape(2, 4, 8) for part in "qkv"
    )
    heads = []
    for head in range(4):
        q1, k0, k1 = (z[:4] + 1j * z[4:] for z in (q[1, head], k[0, head], k[1, head]))
        turn = np.exp(1j * 10000.0 ** (-np.arange(4) / 4))  # from position 0 to position 1
        score = [(q1 * turn * key.conj()).real.sum() / math.sqrt(8) for key in (k0, k1 * turn)]
        first = 1 / (1 + math.exp(score[1] - score[0]))
        heads.append(first * v[0, head] + (1 - first) * v[1, head])
    y = x[1] + w["model.layers.0.self_attn.o_proj.weight"] @ np.concatenate(heads)
    expected = w["lm_head.weight"] @ moma.rms_norm(y, w["model.norm.weight"], 1e-5)
    assert_allclose(moma.forward(config, w, [30, 31])[1], expected, rtol=1e-10)


def test_gqa_equals_mha_with_repeated_kv_heads(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=FOUR_FOUR, heads=6, kv_heads=2)
    ids = sample_ids(config, 3)
    grouped = moma.forward(config, weights, ids)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        for part in ("k_proj.weight", "v_proj.weight", "k_norm.weight", "k_norm.bias"):
            name = f"{prefix}.{part}"
            heads = weights[name].reshape(2, -1)
            weights[name] = np.repeat(heads, 3, axis=0).reshape(-1, weights[name].shape[1])
    config["num_key_value_heads"] = 6
    assert_allclose(moma.forward(config, weights, ids), grouped, rtol=1e-9, atol=1e-12)


def test_qk_norm_is_per_head_and_comes_before_rope(tmp_path: Path) -> None:
    """Scaling a head's q and k does nothing; with zero weight, the biases alone make scores."""
    config, weights = make(tmp_path, groups=DENSE, layers=1)
    ids = sample_ids(config, 3)
    logits = moma.forward(config, weights, ids)
    weights["model.layers.0.self_attn.q_proj.weight"][:8] *= 1e6
    assert_allclose(moma.forward(config, weights, ids), logits, atol=1e-4)  # eps is seen here
    for part in "qk":
        weights[f"model.layers.0.self_attn.{part}_norm.weight"][:] = 0.0
        weights[f"model.layers.0.self_attn.{part}_norm.bias"][:] = 3.0
    biased = moma.forward(config, weights, ids)
    config["rope_theta"] = 10.0  # a bias added after RoPE would not turn with the position
    assert abs(moma.forward(config, weights, ids) - biased).max() > 1e-3


def test_tied_head_reads_the_embedding(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=FOUR_FOUR, tie=True)
    ids = sample_ids(config, 3)
    tied = moma.forward(config, weights, ids)
    assert "lm_head.weight" not in weights
    config["tie_word_embeddings"] = False
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert_array_equal(moma.forward(config, weights, ids), tied)


# -------------------------------------------------------------------------------- expert groups


def test_modality_is_the_image_range_alone(tmp_path: Path) -> None:
    config, _ = make(tmp_path, groups=DENSE)
    images = [t for t in range(64) if moma.modality_of(config, t) == "image"]
    assert images == list(range(4, 20))
    config["image"] = None
    assert moma.modality_of(config, 5) == "text"


def test_one_expert_per_modality_with_equal_weights_is_dense(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=DENSE)
    ids = sample_ids(config, 3)
    dense = moma.forward(config, weights, ids)
    split = dict(weights)
    for name, weight in weights.items():
        for group in ("text", "image"):
            split[name.replace(".all.", f".{group}.")] = weight
    config["expert_groups"] = ONE_ONE
    assert_array_equal(moma.forward(config, split, ids), dense)

    split["model.layers.0.experts.image.down_proj"] = np.ones((1, 32, 85))
    changed = (moma.forward(config, split, ids) != dense).any(axis=1)
    assert_array_equal(changed, np.arange(len(ids)) > ids.index(BEGIN))


@pytest.mark.parametrize("norm_order", ["post", "pre"])
def test_equal_experts_of_weight_one_half_are_one(tmp_path: Path, norm_order: str) -> None:
    config, weights = make(tmp_path, groups=TWO, norm_order=norm_order)
    always(weights, True)
    for layer in range(2):
        prefix = f"model.layers.{layer}.experts.all"
        weights[f"{prefix}.router.weight"][:] = 0.0  # affinity 0.5, not renormalised
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights[f"{prefix}.{part}"][1] = weights[f"{prefix}.{part}"][0]
    ids = sample_ids(config, 3)
    both = moma.forward(config, weights, ids, "calibrated")
    for layer in range(2):
        prefix = f"model.layers.{layer}.experts.all"
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights[f"{prefix}.{part}"] = weights[f"{prefix}.{part}"][:1]
    config["expert_groups"] = [expert_group("all", "text image", 1, 12)]
    assert_allclose(moma.forward(config, weights, ids), both, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm_order", ["post", "pre"])
def test_a_token_without_expert_gets_nothing(tmp_path: Path, norm_order: str) -> None:
    config, weights = make(tmp_path, groups=MOE_8X, norm_order=norm_order)
    always(weights, False)
    ids = sample_ids(config, 3)
    passed = moma.forward(config, weights, ids, "calibrated")
    for name in weights:
        if name.endswith("down_proj"):
            weights[name][:] = 0.0
    assert_array_equal(moma.forward(config, weights, ids, "threshold"), passed)


# ------------------------------------------------------------------------------------ selection


def test_expert_choice_by_hand(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=TWO, layers=1)
    silence_attention(weights)
    router = "model.layers.0.experts.all.router"
    set_logits(weights, router, {30: [5, 1], 31: [3, 2], 32: [4, 2], 33: [-2, 2], 34: [9, -1]})
    ids = [31, 30, 32, 33, 34]

    # b = 5, E = 2: k = 2. Expert 1 ties three times at 2.0: the lower two indices win.
    taken = selections(config, weights, ids, "expert_choice")[router]
    assert_array_equal(taken.selected, [[0, 1], [1, 0], [0, 1], [0, 0], [1, 0]])
    assert taken.margin == 0.0

    # The first three are the prompt: k = 1. The others go by the auxiliary router.
    causal = selections(config, weights, ids, "causal")[router]
    taken = selections(config, weights, ids, "expert_choice", prompt_len=3)[router]
    assert_array_equal(taken.selected[:3], [[0, 1], [1, 0], [0, 0]])
    assert_array_equal(taken.selected[3:], causal.selected[3:])

    # Any tokens can be the scope.
    scope = [False, False, False, True, True]
    taken = selections(config, weights, ids, "expert_choice", scope=scope)[router]
    assert_array_equal(taken.selected[3:], [[0, 1], [1, 0]])
    assert_array_equal(taken.selected[:3], causal.selected[:3])
    with pytest.raises(ValueError, match="not both"):
        moma.forward(config, weights, ids, "expert_choice", prompt_len=2, scope=scope)


def test_expert_choice_counts_its_own_group_and_takes_at_least_one(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=FOUR_FOUR, layers=1)
    ids = [0, *range(30, 38), BEGIN, 5, 6, 7, END]  # 11 text tokens, 3 image tokens
    taken = selections(config, weights, ids, "expert_choice")
    text, image = (taken[f"model.layers.0.experts.{name}.router"] for name in ("text", "image"))
    assert_array_equal(text.selected.sum(axis=0), [11 // 4] * 4)
    assert_array_equal(image.selected.sum(axis=0), [1] * 4)
    assert_array_equal(image.positions, [10, 11, 12])


def test_causal_threshold_and_calibrated_by_hand(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=TWO, layers=1)
    silence_attention(weights)
    router, aux = "model.layers.0.experts.all.router", "model.layers.0.experts.all.aux_router"
    set_logits(weights, router, {30: [3.0, 0.1], 31: [0.0, -0.1], 32: [1.0, -3.0]})
    ids = [30, 31, 32]

    taken = selections(config, weights, ids, "threshold")[router]
    assert_array_equal(taken.selected, [[1, 1], [0, 0], [1, 0]])

    weights[f"{router}.threshold"][:] = [0.75, 0.4]  # logits 1.0986 and -0.405
    taken = selections(config, weights, ids, "calibrated")[router]
    assert_array_equal(taken.selected, [[1, 1], [0, 1], [0, 0]])

    # Hidden unit j reads the embedding's dimension j; expert 0 wants it, expert 1 shuns it.
    weights[f"{aux}.fc1.weight"] = np.eye(2, 32)
    weights[f"{aux}.fc2.weight"] = np.array([[1.0, 0.0], [-1.0, 0.0]])
    taken = selections(config, weights, ids, "causal")[router]
    assert_array_equal(taken.selected, [[1, 0], [0, 0], [1, 0]])  # 0 is not above 0
    assert taken.margin == 0.0


def test_the_main_router_weighs_what_the_auxiliary_router_selects(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=TWO, layers=1, norm_order="post")
    silence_attention(weights)
    set_logits(weights, "model.layers.0.experts.all.router", {30: [-3.0, 2.0]})
    aux = "model.layers.0.experts.all.aux_router"
    weights[f"{aux}.fc1.weight"] = np.eye(2, 32)
    weights[f"{aux}.fc2.weight"] = np.array([[0.0, 1.0], [0.0, -1.0]])  # expert 0 alone

    x = weights["model.embed_tokens.weight"][30]
    gate, up, down = (
        weights[f"model.layers.0.experts.all.{part}_proj"][0] for part in ("gate", "up", "down")
    )
    z = gate @ x
    out = 1 / (1 + math.exp(3.0)) * down @ (z / (1 + np.exp(-z)) * (up @ x))
    y = x + out / np.sqrt((out**2).mean() + 1e-5) * weights["model.layers.0.ffn_norm.weight"]
    y = y / np.sqrt((y**2).mean() + 1e-5) * weights["model.norm.weight"]
    expected = weights["lm_head.weight"] @ y
    assert_allclose(moma.forward(config, weights, [30], "causal")[0], expected, rtol=1e-10)


@pytest.mark.parametrize("case", ["moe_8x_post", "4t4i_pre", "depth_4t4i_post"])
def test_only_expert_choice_lets_later_tokens_reach_back(tmp_path: Path, case: str) -> None:
    config, weights = make(tmp_path, **CASES[case])
    ids = sample_ids(config, 3)
    for policy in moma.POLICIES:
        before = moma.forward(config, weights, ids, policy)
        reached_back = False
        for other in range(40, 60):
            after = moma.forward(config, weights, [*ids[:-2], other, other], policy)
            assert abs(after[-1] - before[-1]).max() > 1e-6 or other == ids[-1]
            reached_back |= bool(abs(after[:-2] - before[:-2]).max() > 1e-6)
        assert reached_back == (policy == "expert_choice")


def test_prompt_routing_ends_with_the_prompt(tmp_path: Path) -> None:
    config, weights = make(tmp_path, **CASES["depth_4t4i_post"])
    ids = sample_ids(config, 3)
    prompt = moma.forward(config, weights, ids[:20], "expert_choice")
    whole = moma.forward(config, weights, ids, "expert_choice", prompt_len=20)
    assert_allclose(whole[:20], prompt, atol=1e-10)
    none = moma.forward(config, weights, ids, "expert_choice", prompt_len=0)
    assert_array_equal(none, moma.forward(config, weights, ids, "causal"))


def test_what_a_policy_lacks_is_said(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=TWO, aux_routers=False, thresholds=False)
    with pytest.raises(ValueError, match=r"'causal' needs model\.layers\.0.*aux_router\.fc1"):
        moma.forward(config, weights, [0, 30])
    with pytest.raises(ValueError, match=r"'calibrated' needs model\.layers\.0.*threshold"):
        moma.forward(config, weights, [0, 30], "calibrated")
    moma.forward(config, weights, [0, 30], "threshold")
    moma.forward(config, weights, [0, 30], "expert_choice")
    for bad in ([], [-1], [64]):
        with pytest.raises(ValueError, match="token ids"):
            moma.forward(config, weights, bad)


# -------------------------------------------------------------------------------- depth routing


def test_depth_choice_by_hand_with_ties(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=DENSE, layers=1, depth=depth_of([0], 0.4))
    router = "model.layers.0.depth_router"
    set_logits(weights, router, {30: [1.0], 31: [2.0], 32: [0.5]})
    taken = selections(config, weights, [30, 32, 31, 30, 30, 32, 32], "expert_choice")[router]
    assert_array_equal(taken.selected[:, 0], [1, 0, 1, 0, 0, 0, 0])  # floor(0.4 * 7) = 2
    weights[f"{router}.weight"] *= 500.0  # saturated sigmoids still rank by logit
    taken = selections(config, weights, [30, 32, 31, 30, 30, 32, 32], "expert_choice")[router]
    assert_array_equal(taken.selected[:, 0], [1, 0, 1, 0, 0, 0, 0])


def test_a_skipped_token_passes_unchanged_and_is_invisible(tmp_path: Path) -> None:
    config, weights = make(tmp_path, groups=FOUR_FOUR, layers=1, depth=depth_of([0], 0.5))
    router = "model.layers.0.depth_router"
    weights[f"{router}.threshold"][:] = 0.5
    set_logits(weights, router, {30: [2.0], 31: [-2.0], 32: [-3.0], 33: [1.0]})
    logits = moma.forward(config, weights, [30, 31, 33, 30], "calibrated")
    other = moma.forward(config, weights, [30, 32, 33, 30], "calibrated")
    assert_array_equal(other[[0, 2, 3]], logits[[0, 2, 3]])
    x = weights["model.embed_tokens.weight"][31]
    normed = moma.rms_norm(x, weights["model.norm.weight"], 1e-5)
    assert_allclose(logits[1], normed @ weights["lm_head.weight"].T, rtol=1e-12)

    taken = moma.forward(config, weights, [30, 33, 33, 30], "calibrated")
    assert abs(taken[2:] - logits[2:]).max() > 1e-3  # the control: a taken token is seen
    shorter = moma.forward(config, weights, [30, 33, 30], "calibrated")
    assert_allclose(shorter[0], logits[0], rtol=1e-12)
    assert abs(shorter[1] - logits[2]).max() > 1e-6  # positions stay the original ones


def test_depth_modalities_leave_the_others_alone(tmp_path: Path) -> None:
    depth = depth_of([0], 0.5, modalities=["image"])
    config, weights = make(tmp_path, groups=FOUR_FOUR, depth=depth)
    words = [0, *range(30, 40)]
    routed = moma.forward(config, weights, words)
    mixed = [*words, BEGIN, 5, 6, 7, 8, END, 41]
    router = "model.layers.0.depth_router"
    taken = selections(config, weights, mixed, "expert_choice")[router]
    assert_array_equal(taken.positions, [12, 13, 14, 15])
    assert taken.selected.sum() == 2  # half of the 4 image tokens, not of all 18
    config["depth_routing"] = None
    assert_allclose(moma.forward(config, weights, words), routed, rtol=1e-9, atol=1e-12)


def test_experts_of_a_routed_layer_count_taken_tokens_alone(tmp_path: Path) -> None:
    depth = depth_of([0, 2], [0.5, 0.9])
    config, weights = make(tmp_path, groups=FOUR_FOUR, layers=3, depth=depth)
    ids = sample_ids(config, 3, words=12)
    for prompt_len in (len(ids), 30):
        taken = selections(config, weights, ids, "expert_choice", prompt_len=prompt_len)
        for layer, capacity in ((0, 0.5), (2, 0.9)):
            chosen = taken[f"model.layers.{layer}.depth_router"].selected[:, 0]
            assert chosen[:prompt_len].sum() == math.floor(capacity * prompt_len)
            for name in ("text", "image"):
                experts = taken[f"model.layers.{layer}.experts.{name}.router"]
                group = [moma.modality_of(config, token) == name for token in ids]
                assert_array_equal(experts.positions, np.flatnonzero(chosen & group))
                in_scope = experts.positions < prompt_len
                share = max(1, int(in_scope.sum()) // 4)
                assert_array_equal(experts.selected[in_scope].sum(axis=0), [share] * 4)
