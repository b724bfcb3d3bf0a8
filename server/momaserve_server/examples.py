"""Bodies and replies that the OpenAPI page shows. Tests send the former and check the latter."""

from __future__ import annotations

from typing import Any

from momaserve_server.openapi import Loose

PNG = "iVBORw0KGgoAAAANSUhEUgAA..."
_USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 12,
    "total_tokens": 21,
    "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 0},
    "completion_tokens_details": {"image_tokens": 0},
}

CHAT: dict[str, Any] = {
    "words": {"messages": [{"role": "user", "content": "red apple"}], "max_tokens": 32},
    "a picture, streamed": {
        "messages": [{"role": "user", "content": "red apple"}],
        "modalities": ["image"],
        "stream": True,
        "seed": 1,
    },
    "which experts each token used": {
        "messages": [{"role": "user", "content": "red apple"}],
        "max_tokens": 4,
        "include_routing": True,
        "return_token_ids": True,
    },
}
CHAT_REPLY: dict[str, Any] = {
    "id": "chatcmpl-8f14e45fceea167a5a36dedd4bea2543",
    "object": "chat.completion",
    "created": 1767225600,
    "model": "demo",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": Loose("apple, fruit, red")},
            "logprobs": Loose(None),
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE,
}

COMPLETION: dict[str, Any] = {
    "words": {"prompt": "red apple", "max_tokens": 16, "seed": 1},
    "log-probabilities of a prompt": {
        "prompt": "red apple",
        "echo": True,
        "logprobs": 2,
        "max_tokens": 0,
    },
}
COMPLETION_REPLY: dict[str, Any] = {
    "id": "cmpl-8f14e45fceea167a5a36dedd4bea2543",
    "object": "text_completion",
    "created": 1767225600,
    "model": "demo",
    "choices": [
        {"index": 0, "text": "apple, fruit", "logprobs": Loose(None), "finish_reason": "stop"}
    ],
    "usage": _USAGE,
}

IMAGE: dict[str, Any] = {
    "a picture": {"prompt": "red apple", "seed": 1},
    "two, streamed as they grow": {
        "prompt": "red apple",
        "n": 2,
        "stream": True,
        "partial_images": 2,
    },
}
IMAGE_REPLY: dict[str, Any] = {
    "created": 1767225600,
    "size": "72x72",
    "quality": "auto",
    "background": "opaque",
    "output_format": "png",
    "data": [{"b64_json": PNG}],
    "usage": {
        "input_tokens": 9,
        "output_tokens": 144,
        "total_tokens": 153,
        "input_tokens_details": {"text_tokens": 9, "image_tokens": 0, "cached_tokens": 0},
    },
}

TOKENIZE: dict[str, Any] = {
    "a prompt, as the model reads it": {"prompt": "red apple", "return_token_strs": True},
    "bare text": {"prompt": "red apple", "add_special_tokens": False},
    "a conversation": {"messages": [{"role": "user", "content": "red apple"}]},
}
TOKENIZE_REPLY: dict[str, Any] = {
    "tokens": [0, 812, 334],
    "count": 3,
    "max_model_len": 1024,
    "modalities": ["text", "text", "text"],
    "image_spans": [],
    "token_strs": Loose(["<|bos|>", "red", " apple"]),
}
DETOKENIZE: dict[str, Any] = {"what /v1/tokenize gave": {"tokens": [0, 65, 66]}}
DETOKENIZE_REPLY: dict[str, Any] = {
    "prompt": "red apple",
    "parts": [{"type": "text", "text": Loose("red apple")}],
}

MODEL: dict[str, Any] = {
    "id": "demo",
    "object": "model",
    "created": 1767225600,
    "owned_by": "momaserve",
    "max_model_len": 1024,
    "vocab_size": 4096,
    "modalities": ["text", "image"],
    "has_tokenizer": True,
    "image": Loose(
        {
            "tokens_per_image": 144,
            "grid": [12, 12],
            "size": [72, 72],
            "first_token_id": 6,
            "num_codes": 1000,
            "begin_token_id": 3,
            "end_token_id": 4,
        }
    ),
    "expert_groups": [{"name": "text", "modalities": ["text"], "num_experts": 4}],
    "depth_routing": None,
    "routing": {"default": "causal", "prompt": "same"},
    "defaults": Loose({"temperature": 0.2, "image_temperature": 0.5, "guidance_scale": 1.0}),
    "limits": Loose({"n": 16, "logprobs": 20}),
}
_AGREEMENT = {
    "accuracy": Loose(0.953),
    "precision": Loose(0.91),
    "recall": Loose(0.902),
    "f1": Loose(0.906),
}
ROUTER: dict[str, Any] = {
    "object": "router",
    "routing": "causal",
    "prompt_routing": "same",
    "num_steps": 812,
    "groups": [
        {
            "name": "text",
            "modalities": ["text"],
            "num_experts": 2,
            "num_tokens": 100,
            "mean_experts_per_token": Loose(0.97),
            "experts_per_token": Loose([20, 63, 17]),
            "layers": Loose(
                [
                    {
                        "layer": 0,
                        "num_tokens": 100,
                        "expert_tokens": [40, 57],
                        "load": [0.412, 0.588],
                        "mean_experts_per_token": 0.97,
                    }
                ]
            ),
        }
    ],
    "depth": [],
    "shadow_eval": Loose(
        {
            "rate": 0.05,
            "policy": "causal",
            "since": 1767225600,
            "num_requests": 41,
            "num_waiting_tokens": 310,
            "num_dropped": 0,
            "num_failed": 0,
            "tokens": {"text": 2210, "image": 5904},
            "not_routed": [],
            "window": {"num_tokens": 8114, "since": Loose(1767225660)},
            "agreement": [
                {
                    "group": "text",
                    **_AGREEMENT,
                    "layers": [
                        {"layer": 0, **_AGREEMENT, "experts": [{"expert": 0, **_AGREEMENT}]}
                    ],
                }
            ],
            "nll": {
                "expert_choice": {"text": Loose(1.204), "image": Loose(3.118)},
                "served": {"text": Loose(1.211), "image": Loose(3.125)},
            },
        }
    ),
}
ABORTED: dict[str, Any] = {
    "id": "chatcmpl-8f14e45fceea167a5a36dedd4bea2543",
    "object": "request",
    "aborted": True,
}
