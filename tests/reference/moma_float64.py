"""The slow, obvious MoMa forward in numpy float64: the oracle that every faster program is held to.

Written from the model contract (`model.md`) alone and imports nothing of `momaserve`, so that an
agreement of the two means something. One sequence, no cache, no batching, loops where loops are
clear. `trace` reports every routing decision and how far it stood from the cut: a float32 program
may rightly differ where that margin is tiny. The random checkpoints to compare on are made by
`checkpoints` beside this file and are re-exported here.

Letters: T tokens, D hidden size, H query heads, G kv heads, K head dim, F expert hidden size,
E experts in a group, A auxiliary router hidden size, V vocabulary, n the tokens a layer took.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.reference.checkpoints import CASES as CASES
from tests.reference.checkpoints import random_checkpoint as random_checkpoint
from tests.reference.checkpoints import sample_ids as sample_ids

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
Config = dict[str, Any]
Weights = dict[str, FloatArray]
Policy = Literal["causal", "expert_choice", "calibrated", "threshold"]
POLICIES: tuple[Policy, ...] = ("causal", "expert_choice", "calibrated", "threshold")


@dataclass(frozen=True)
class Decision:
    """What one router decided in one forward."""

    router: str
    """Tensor prefix, as `model.layers.0.experts.text.router` or `model.layers.0.depth_router`."""
    positions: IntArray
    """Positions of the tokens that the router scored, ascending `[n]`."""
    selected: BoolArray
    """`[n, E]`; E is 1 for a depth router."""
    margin: float
    """Smallest distance, in logits, of any score from the cut; an exact tie at the cut is 0."""


@dataclass(frozen=True)
class _Run:
    """What stays fixed during one forward."""

    config: Config
    weights: Weights
    policy: Policy
    modality: NDArray[np.str_]  # [T]
    in_scope: BoolArray  # [T]; read by expert_choice only
    trace: list[Decision] | None


# ---------------------------------------------------------------------------------- checkpoint


def load_checkpoint(directory: str | Path) -> tuple[Config, Weights]:
    """Read `config.json` and `model.safetensors` (or its shards); every tensor as float64."""
    root = Path(directory)
    config: Config = json.loads((root / "config.json").read_text())
    index = root / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    weights: Weights = {}
    for name in sorted(files):
        weights |= _read_safetensors(root / name)
    return config, weights


def _read_safetensors(path: Path) -> Weights:
    """Read the format by hand: `safetensors.numpy` refuses bf16."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    weights: Weights = {}
    for name, spec in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = spec["data_offsets"]
        data = raw[start + first : start + last]
        if spec["dtype"] == "BF16":  # bf16 is the upper half of a float32
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[spec["dtype"]])
        weights[name] = values.astype(np.float64).reshape(spec["shape"])
    return weights


# ------------------------------------------------------------------------------------- forward


def forward(
    config: Config,
    weights: Weights,
    token_ids: Sequence[int],
    policy: Policy = "causal",
    prompt_len: int | None = None,
    scope: Sequence[bool] | None = None,
    trace: list[Decision] | None = None,
) -> FloatArray:
    """Logits `[T, V]` of one sequence.

    `expert_choice` ranks the tokens in scope: the first `prompt_len` (default: all), or those
    that `scope` (one claim per token) names; tokens out of scope are selected causally. The other
    policies ignore both. Each router's decision is appended to `trace`.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}")
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= config["vocab_size"]:
        raise ValueError("token ids must be non-empty and within the vocabulary")
    if scope is None:
        in_scope = np.arange(len(ids)) < (len(ids) if prompt_len is None else prompt_len)
    elif prompt_len is not None or len(scope) != len(ids):
        raise ValueError("give prompt_len or a scope of one claim per token, not both")
    else:
        in_scope = np.asarray(scope, dtype=np.bool_)
    modality = np.array([modality_of(config, int(token)) for token in ids])
    run = _Run(config, weights, policy, modality, in_scope, trace)

    x = weights["model.embed_tokens.weight"][ids]  # [T, D]
    for layer in range(config["num_hidden_layers"]):
        x = _layer(run, layer, x)
    x = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    tied = config["tie_word_embeddings"]
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def log_probs(logits: FloatArray) -> FloatArray:
    """Log-softmax over the last axis, the whole vocabulary."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def token_log_probs(
    config: Config,
    weights: Weights,
    ids: Sequence[int],
    policy: Policy = "causal",
    prompt_len: int | None = None,
    scope: Sequence[bool] | None = None,
) -> list[float | None]:
    """Entry t is log p(ids[t] | ids[:t]); the first token has none."""
    table = log_probs(forward(config, weights, ids, policy, prompt_len, scope))
    return [None, *(float(table[t - 1, ids[t]]) for t in range(1, len(ids)))]


def modality_of(config: Config, token: int) -> str:
    image = config["image"]
    if image is None:
        return "text"
    return "image" if 0 <= token - image["first_token_id"] < image["num_codes"] else "text"


def _layer(run: _Run, layer: int, x: FloatArray) -> FloatArray:
    """One layer with its depth router, if it has one (contract, section 5)."""
    depth = run.config["depth_routing"]
    if depth is None or layer not in depth["layers"]:
        return _block(run, layer, x, np.arange(len(x)))
    capacity = depth["capacity"]
    if isinstance(capacity, list):
        capacity = capacity[depth["layers"].index(layer)]
    modalities = depth.get("modalities") or ["text", "image"]
    prefix = f"model.layers.{layer}.depth_router"

    scored = np.flatnonzero(np.isin(run.modality, modalities))  # the others are always taken
    logits = _router_logits(x[scored], run.weights[f"{prefix}.weight"])
    chosen = _select(
        run, prefix, f"{prefix}.aux", x[scored], scored, logits, lambda b: math.floor(capacity * b)
    )
    taken = np.ones(len(x), dtype=np.bool_)
    taken[scored] = chosen[:, 0]
    s = np.ones(len(x))
    s[scored] = sigmoid(logits[:, 0])

    y = x.copy()
    rows = np.flatnonzero(taken)
    if len(rows) > 0:
        y[rows] += s[rows, None] * (_block(run, layer, x[rows], rows) - x[rows])
    return y


def _block(run: _Run, layer: int, x: FloatArray, positions: IntArray) -> FloatArray:
    """Attention and FFN over the n tokens given, which alone see one another. `[n, D]`."""
    eps = run.config["rms_norm_eps"]
    norm_attn = run.weights[f"model.layers.{layer}.attn_norm.weight"]
    norm_ffn = run.weights[f"model.layers.{layer}.ffn_norm.weight"]
    if run.config["norm_order"] == "post":
        h = x + rms_norm(_attention(run, layer, x, positions), norm_attn, eps)
        return h + rms_norm(_ffn(run, layer, h, positions), norm_ffn, eps)
    if run.config["norm_order"] != "pre":
        raise ValueError(f"unknown norm_order {run.config['norm_order']!r}")
    h = x + _attention(run, layer, rms_norm(x, norm_attn, eps), positions)
    return h + _ffn(run, layer, rms_norm(h, norm_ffn, eps), positions)


def _attention(run: _Run, layer: int, u: FloatArray, positions: IntArray) -> FloatArray:
    config, prefix = run.config, f"model.layers.{layer}.self_attn"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, n = config["head_dim"], len(u)
    q = (u @ run.weights[f"{prefix}.q_proj.weight"].T).reshape(n, heads, head_dim)
    k = (u @ run.weights[f"{prefix}.k_proj.weight"].T).reshape(n, kv_heads, head_dim)
    v = (u @ run.weights[f"{prefix}.v_proj.weight"].T).reshape(n, kv_heads, head_dim)
    if config["qk_norm"]:
        weight, bias = (run.weights[f"{prefix}.q_norm.{part}"] for part in ("weight", "bias"))
        q = layer_norm(q) * weight + bias
        weight, bias = (run.weights[f"{prefix}.k_norm.{part}"] for part in ("weight", "bias"))
        k = layer_norm(k) * weight + bias
    q = rope(q, positions, config["rope_theta"])
    k = rope(k, positions, config["rope_theta"])

    visible = positions[:, None] >= positions[None, :]  # [query, key]
    out = np.zeros((n, heads, head_dim))
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        scores = np.where(visible, q[:, head] @ k[:, kv_head].T * head_dim**-0.5, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = shares / shares.sum(axis=1, keepdims=True) @ v[:, kv_head]
    return out.reshape(n, heads * head_dim) @ run.weights[f"{prefix}.o_proj.weight"].T


def _ffn(run: _Run, layer: int, u: FloatArray, positions: IntArray) -> FloatArray:
    """All expert groups; `u` is what the experts, and their routers, read. `[n, D]`."""
    out = np.zeros_like(u)
    for group in run.config["expert_groups"]:
        prefix = f"model.layers.{layer}.experts.{group['name']}"
        num_experts: int = group["num_experts"]
        rows = np.flatnonzero(np.isin(run.modality[positions], group["modalities"]))
        if num_experts == 1:
            selected = np.ones((len(rows), 1), dtype=np.bool_)
            affinity = np.ones((len(rows), 1))
        else:
            logits = _router_logits(u[rows], run.weights[f"{prefix}.router.weight"])
            selected = _select(
                run,
                f"{prefix}.router",
                f"{prefix}.aux_router",
                u[rows],
                positions[rows],
                logits,
                lambda b, num_experts=num_experts: b // num_experts,  # type: ignore[misc]
            )
            affinity = sigmoid(logits)
        for e in range(num_experts):
            gate = run.weights[f"{prefix}.gate_proj"][e]  # [F, D]
            up = run.weights[f"{prefix}.up_proj"][e]  # [F, D]
            down = run.weights[f"{prefix}.down_proj"][e]  # [D, F]
            for i, row in enumerate(rows):
                if selected[i, e]:
                    out[row] += affinity[i, e] * (down @ (silu(gate @ u[row]) * (up @ u[row])))
    return out


def _select(
    run: _Run,
    router: str,
    aux: str,
    u: FloatArray,
    positions: IntArray,
    logits: FloatArray,
    capacity: Callable[[int], int],
) -> BoolArray:
    """Which tokens each expert takes `[n, E]` (contract, section 4).

    `logits` `[n, E]` are the main router's for the n tokens `u`, which stand in ascending order;
    `capacity` maps b, the tokens in scope, to an expert's share of them before the floor of 1.
    """
    if run.policy == "threshold":
        margins = logits
        selected = margins > 0.0
    elif run.policy == "calibrated":
        threshold = np.clip(_need(run, f"{router}.threshold"), 0.0, 1.0)  # [E], probabilities
        with np.errstate(divide="ignore"):
            margins = logits - (np.log(threshold) - np.log1p(-threshold))
        selected = margins > 0.0
    else:
        scoped = run.in_scope[positions] & (run.policy == "expert_choice")
        pool = [int(i) for i in np.flatnonzero(scoped)]
        k = min(max(1, capacity(len(pool))), len(pool))
        selected = np.zeros(logits.shape, dtype=np.bool_)
        margins = np.full(logits.shape, np.inf)
        for e in range(logits.shape[1]):
            order = sorted(pool, key=lambda i, e=e: (-logits[i, e], i))  # type: ignore[misc]
            selected[order[:k], e] = True
            if k < len(pool):
                margins[order[k], e] = logits[order[k - 1], e] - logits[order[k], e]
        later = np.flatnonzero(~scoped)
        if len(later) > 0:
            hidden = silu(u[later] @ _need(run, f"{aux}.fc1.weight").T)
            margins[later] = _router_logits(hidden, _need(run, f"{aux}.fc2.weight"))
            selected[later] = margins[later] > 0.0
    if run.trace is not None:
        margin = float(np.abs(margins).min(initial=np.inf))
        run.trace.append(Decision(router, positions, selected, margin))
    return selected


def _need(run: _Run, name: str) -> FloatArray:
    if name not in run.weights:
        raise ValueError(f"selection policy {run.policy!r} needs {name}, which is not there")
    return run.weights[name]


def _router_logits(u: FloatArray, weight: FloatArray) -> FloatArray:
    """`u W^T`, summed in an order that depends on the row alone: equal tokens tie exactly."""
    logits: FloatArray = (u[:, None, :] * weight[None, :, :]).sum(axis=-1)
    return logits


# ------------------------------------------------------------------------------------ formulas


def sigmoid(z: FloatArray) -> FloatArray:
    result: FloatArray = np.exp(-np.logaddexp(0.0, -z))
    return result


def silu(z: FloatArray) -> FloatArray:
    return z * sigmoid(z)


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    normalised: FloatArray = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return normalised * weight


def layer_norm(x: FloatArray) -> FloatArray:
    """Over the last axis, eps 1e-5, without weight and bias."""
    centred = x - x.mean(axis=-1, keepdims=True)
    normalised: FloatArray = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return normalised


def rope(x: FloatArray, positions: IntArray, theta: float) -> FloatArray:
    """Rotate `[n, heads, K]`: dimension j turns with dimension j + K/2, at theta^(-2j/K)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)  # [n, K/2]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
