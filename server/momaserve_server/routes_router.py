"""`GET /v1/router`: what the experts had to do since the start, and how well routers chose them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from momaserve.models.config import ExpertGroupConfig
from momaserve_server import examples
from momaserve_server.context import context_of
from momaserve_server.openapi import no_body
from momaserve_server.routing_metrics import RoutingTotals
from momaserve_server.shadow_report import shadow_report

router = APIRouter()


@router.get("/v1/router", openapi_extra=no_body(examples.ROUTER))
async def get_router(request: Request) -> dict[str, Any]:
    context = context_of(request)
    engine, totals = context.async_engine.engine, context.metrics.routing_totals()
    return {
        "object": "router",
        "routing": str(engine.config.routing),
        "prompt_routing": str(engine.config.prompt_routing or "same"),
        "num_steps": totals.num_steps,
        "groups": [_group(group, totals) for group in engine.model_config.expert_groups],
        "depth": [
            {"layer": layer, "taken": taken, "skipped": skipped}
            for layer, (taken, skipped) in sorted(totals.depth_tokens.items())
        ],
        "shadow_eval": None if context.shadow_eval is None else shadow_report(context.shadow_eval),
    }


def _group(group: ExpertGroupConfig, totals: RoutingTotals) -> dict[str, Any]:
    counts = totals.experts_per_token.get(group.name, [])
    num_pairs = sum(counts)
    seen = {layer: n for (layer, name), n in totals.group_tokens.items() if name == group.name}
    return {
        "name": group.name,
        "modalities": [modality.label for modality in group.modalities],
        "num_experts": group.num_experts,
        "num_tokens": max(seen.values(), default=0),
        "mean_experts_per_token": _ratio(
            sum(n * count for n, count in enumerate(counts)), num_pairs
        ),
        "experts_per_token": counts,
        "layers": [
            _layer(layer, num_tokens, totals.expert_tokens[layer, group.name])
            for layer, num_tokens in sorted(seen.items())
        ],
    }


def _layer(layer: int, num_tokens: int, expert_tokens: Sequence[int]) -> dict[str, Any]:
    return {
        "layer": layer,
        "num_tokens": num_tokens,
        "expert_tokens": expert_tokens,
        "load": _shares(expert_tokens),
        "mean_experts_per_token": _ratio(sum(expert_tokens), num_tokens),
    }


def _shares(tokens: Sequence[int]) -> list[float] | None:
    total = sum(tokens)
    return [count / total for count in tokens] if total else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
