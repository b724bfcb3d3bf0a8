"""Requests of a workload as HTTP: route and body."""

from __future__ import annotations

import base64
import json
from typing import Any

from momaserve_bench.workload import Kind, WorkItem

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
IMAGES = "/v1/images/generations"


def http_request(
    item: WorkItem, *, model: str, salt: str, partial_images: int
) -> tuple[str, bytes]:
    """Route and JSON body of a request that is streamed, greedy and of an exact length.

    Prompts of ids go to completions, where an open picture at their end is drawn to its end;
    words that ask for a picture to the images route; a picture with words to chat.

    Args:
        salt: requests share computed prefixes only with those of the same salt.
        partial_images: unfinished states that the images route is to show.
    """
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "seed": item.seed,
        "image_temperature": 0.0,
        "guidance_scale": 1.0,
        "cache_salt": salt,
    }
    if item.kind is Kind.IMAGE_OUTPUT and not item.token_ids:
        body |= {"prompt": item.words, "partial_images": partial_images}
        return IMAGES, json.dumps(body).encode()
    body |= {
        "max_tokens": item.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    if item.token_ids:
        body["prompt"] = list(item.token_ids)
        return COMPLETIONS, json.dumps(body).encode()
    content: list[dict[str, Any]] = [{"type": "text", "text": item.words}]
    if item.picture:
        url = "data:image/png;base64," + base64.b64encode(item.picture).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body["messages"] = [{"role": "user", "content": content}]
    return CHAT, json.dumps(body).encode()
