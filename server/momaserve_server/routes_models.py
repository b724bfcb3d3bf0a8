"""`/v1/models`, `/v1/models/{id}` and `/version`: what is served here, and its limits."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from momaserve import __version__
from momaserve_server import examples
from momaserve_server.context import ServerContext, context_of
from momaserve_server.openapi import READS, no_body

router = APIRouter()


@router.get(
    "/v1/models",
    openapi_extra=no_body({"object": "list", "data": [examples.MODEL]}),
)
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [model_card(context_of(request))]}


@router.get(
    "/v1/models/{model_id:path}",
    openapi_extra=no_body(examples.MODEL, statuses=(404, *READS)),
)
async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    context = context_of(request)
    context.check_model(model_id)
    return model_card(context)


@router.get("/version", openapi_extra=no_body({"version": "0.1.0", "model": "demo"}))
async def get_version(request: Request) -> dict[str, Any]:
    return {"version": __version__, "model": context_of(request).model_name}


def model_card(context: ServerContext) -> dict[str, Any]:
    """OpenAI's model object, and what a client needs to know about this one."""
    engine, settings = context.async_engine.engine, context.settings
    config, processor = engine.model_config, engine.processor
    image = config.image
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "momaserve",
        "max_model_len": engine.max_model_len,
        "vocab_size": config.vocab_size,
        "modalities": ["text"] if image is None else ["text", "image"],
        "has_tokenizer": processor.text is not None,
        "image": None
        if image is None
        else {
            "tokens_per_image": image.tokens_per_image,
            "grid": list(image.grid),
            "size": None if processor.image is None else [processor.image.image_size] * 2,
            "first_token_id": image.first_token_id,
            "num_codes": image.num_codes,
            "begin_token_id": image.begin_token_id,
            "end_token_id": image.end_token_id,
        },
        "expert_groups": [
            {
                "name": group.name,
                "modalities": [modality.label for modality in group.modalities],
                "num_experts": group.num_experts,
            }
            for group in config.expert_groups
        ],
        "depth_routing": None
        if config.depth_routing is None
        else {"layers": list(config.depth_routing.layers)},
        "routing": {
            "default": str(engine.config.routing),
            "prompt": str(engine.config.prompt_routing or "same"),
        },
        "defaults": _defaults(context),
        "limits": {
            "n": settings.max_n,
            "output_tokens": settings.max_output_tokens,
            "logprobs": settings.max_logprobs,
            "stop": settings.max_stop,
            "body_bytes": settings.max_body_bytes,
            "image_bytes": settings.max_image_bytes,
            "image_pixels": settings.max_image_pixels,
            "images_per_request": settings.max_images_per_request,
            "prompts_per_request": settings.max_prompts_per_request,
        },
    }


def _defaults(context: ServerContext) -> dict[str, Any]:
    """What a request gets for fields that it leaves out; null has no one value."""
    engine = context.async_engine.engine
    text, image = engine.defaults.text, engine.defaults.image
    return {
        "temperature": text.temperature,
        "top_p": text.top_p,
        "top_k": text.top_k,
        "min_p": text.min_p,
        "image_temperature": image.temperature,
        "image_top_p": image.top_p,
        "image_top_k": image.top_k,
        "guidance_scale": engine.defaults.guidance_scale,
        "max_tokens": context.settings.max_output_tokens,
        "routing": str(engine.config.routing),
    }
