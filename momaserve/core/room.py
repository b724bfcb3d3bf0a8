"""Whether a request has room: ever, to start now, to go on. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from momaserve.config import RoutingPolicy, SchedulerConfig
from momaserve.core.kv_cache import KVCache
from momaserve.core.step import prompt_must_be_whole
from momaserve.errors import PromptError, RequestError
from momaserve.request import Request


def check_fits(request: Request, config: SchedulerConfig, cache: KVCache) -> None:
    """Checks that a request could run if it were alone. Reads no state: safe on any thread.

    Raises:
        PromptError: its whole course does not fit into the cache, or a prompt that must be
            computed in one step does not fit into a step.
        RequestError: it has more sequences than may run.
    """
    if request.num_prompt_tokens < 1:
        raise PromptError("the prompt must have at least 1 token, got 0")
    num_blocks = cache.blocks_for(request.max_num_tokens)
    what = f"{request.max_num_tokens} tokens (prompt and max_tokens)"
    if request.num_companions:
        size = request.max_num_companion_tokens
        num_blocks += request.num_companions * cache.blocks_for(size)
        what += f" and {request.num_companions} x {size} of guidance"
    if num_blocks > cache.num_blocks:
        raise PromptError(
            f"{what} need {num_blocks} KV blocks of {cache.block_size} tokens, but the KV "
            f"cache has {cache.num_blocks}"
        )
    whole = request.num_prompt_tokens
    if request.num_tokens == whole:  # the step that ends the prompt samples, so it needs all
        whole += sum(companion.num_tokens for companion in request.companions)
    limit = config.max_num_step_tokens
    if prompt_must_be_whole(request) and whole > limit:
        raise PromptError(
            f"prompt_routing {RoutingPolicy.EXPERT_CHOICE} computes the prompt in one step "
            f"of at most {limit} tokens (max_num_step_tokens), got {whole}"
        )
    for name in ("max_num_requests", "max_num_step_tokens"):
        if request.num_sequences > (limit := getattr(config, name)):
            raise RequestError(
                f"guidance makes {request.num_sequences} sequences of one answer, but at most "
                f"{limit} may run ({name})",
                param="guidance_scale",
            )


def num_blocks_to_start(request: Request, cache: KVCache, *, whole_course: bool) -> int:
    """Free blocks for all known tokens of a request, or for all that it may ever have."""
    num_tokens = request.max_num_tokens if whole_course else request.num_tokens + 1
    needed = cache.num_new_blocks(request.sequence, min(num_tokens, request.max_num_tokens))
    # Room for its companions is kept even while it has none.
    size = request.max_num_companion_tokens
    needed += sum(cache.num_new_blocks(companion, size) for companion in request.companions)
    num_absent = request.num_companions - len(request.companions)
    return needed + num_absent * cache.blocks_for(size)


def can_grow(request: Request, counts: Sequence[int], cache: KVCache) -> bool:
    """Whether there are blocks for so many more tokens of each sequence of a running request."""
    needed = sum(
        cache.num_new_blocks(sequence, sequence.num_computed_tokens + count)
        for sequence, count in zip((request.sequence, *request.companions), counts, strict=True)
        if count
    )
    return needed <= cache.num_free_blocks
