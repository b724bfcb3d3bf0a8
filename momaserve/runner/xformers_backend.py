"""The backend of plain torch with the attention of xformers. Needs xformers and Triton.

Of the operators that know paged K/V, the one named here is the one that the wheel itself brings
and that takes small pages. `memory_efficient_attention` would not choose it on its own: it asks
Flash-Attention first, whose paged kernels are packages of their own, and this one for grouped kv
heads alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from xformers.ops import memory_efficient_attention
from xformers.ops.fmha import Inputs, triton_splitk
from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask

from momaserve.core.plan import PlannedSequence, StepPlan
from momaserve.layers.batch import ForwardBatch
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.runner.backends import Backend
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.sampler import Sampler
from momaserve.runner.step_entries import StepEntries
from momaserve.runner.xformers_attention import PagedRuns, XformersAttention, plan_runs


class SplitKOperator:
    """xformers' split-K attention over pages of one size."""

    def __init__(self, page_size: int) -> None:
        """
        Args:
            page_size: a power of two, at least 16.
        """
        self.kernels = triton_splitk.FwOp
        if page_size % self.kernels.BLOCK_N:
            # A page is read in whole tiles of keys; smaller ones, then.
            self.kernels = type("SmallPages", (self.kernels,), {"BLOCK_N": page_size})

    def bias(self, runs: PagedRuns) -> Any:
        """As `PagedOperator.bias`."""
        return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[runs.length] * len(runs.seq_lens),
            kv_seqlen=runs.seq_lens,
            block_tables=runs.page_table,
            page_size=runs.page_size,
            device=runs.page_table.device,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
        """As `PagedOperator.attend`."""
        out: Tensor = memory_efficient_attention(q, k, v, bias, op=(self.kernels, None))
        return out


def obstacle_to(config: ModelConfig, storage: KVStorage) -> str | None:
    """Why the operator will not attend over this memory, or None: it is asked, and then tried."""
    num_groups = config.num_key_value_heads
    per_group = config.num_attention_heads // num_groups
    planned = PlannedSequence("trial", -1, start=0, num_new_tokens=1, blocks=(0,))
    runs = plan_runs(StepPlan(sequences=(planned,)), storage.layout, storage.k.device)[0]
    keys = storage.k[None, :, :, None].expand(1, -1, -1, per_group, -1)
    q = torch.zeros_like(keys[:, :1], memory_format=torch.contiguous_format)
    operator = SplitKOperator(storage.layout.block_size)
    bias = operator.bias(runs)
    inputs = Inputs(query=q, key=keys, value=keys, attn_bias=bias)
    reasons = operator.kernels.not_supported_reasons(inputs)
    if reasons:
        return "; ".join(reasons)
    try:
        operator.attend(q, keys, keys, bias).cpu()
    except Exception as error:  # what Triton raises when it cannot compile has no base of its own
        last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return f"its operator fails on {storage.k.device}: {last_line}"
    return None


def xformers_backend(
    model: MomaModel, storage: KVStorage, sampler: Sampler, *, keep_weights: bool
) -> Backend:
    """Packs nothing: the weights of `model` are used as they are, and so are always kept."""
    operator = SplitKOperator(storage.layout.block_size)

    def forward(plan: StepPlan, batch: ForwardBatch, entries: StepEntries | None) -> Tensor:
        attention = XformersAttention(plan, storage, entries, operator)
        hidden: Tensor = model(replace(batch, attention=attention))
        return hidden

    return Backend("xformers", forward, model.logits, sampler.sample)
