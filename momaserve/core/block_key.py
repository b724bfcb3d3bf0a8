"""Keys of KV blocks: equal only for blocks whose K/V are equal.

A block's K/V depend on all tokens up to its end and on the policies that routed them, so a key
is a chain of SHA-256 over full blocks. The root of a chain holds the tenant's salt: without it
nobody can find out, by timing, what another tenant has asked.
"""

from __future__ import annotations

import hashlib
from array import array

from momaserve.request import TokenSequence


def root_key(salt: str | None) -> bytes:
    """The start of every chain of one tenant; `None` is the tenant that gave no salt."""
    return hashlib.sha256(b"" if salt is None else b"salt:" + salt.encode()).digest()


def next_block_key(sequence: TokenSequence, parent: bytes, block_size: int) -> bytes:
    """Key of the full block of `sequence` that follows the block with key `parent`."""
    start = len(sequence.block_keys) * block_size
    stop = start + block_size
    num_prompt = min(max(sequence.num_prompt_tokens - start, 0), block_size)
    if sequence.prompt_routing is sequence.routing or not num_prompt:
        policies = sequence.routing.encode()
    elif num_prompt == block_size:
        policies = sequence.prompt_routing.encode()
    else:
        policies = f"{num_prompt}:{sequence.prompt_routing}:{sequence.routing}".encode()
    token_ids = array("q", sequence.token_ids[start:stop]).tobytes()
    return hashlib.sha256(parent + token_ids + policies).digest()
