"""How much K/V memory there is, and how it is laid out."""

from __future__ import annotations

import pytest
import torch

from momaserve.errors import ConfigError
from momaserve.runner import kv_storage
from momaserve.runner.kv_storage import KVLayout, block_bytes, choose_num_blocks
from tests.models.factory import make_config
from tests.runner.factory import make_storage

CONFIG = make_config(depth_routing=None)  # 3 layers, 2 kv heads of 6
ROUTED = make_config()  # layers 0 and 2 have depth routers
TOKEN_BYTES = 2 * 3 * 2 * 6 * 4


def num_blocks(
    *,
    kv_cache_bytes: int | None = None,
    max_num_requests: int = 1,
    max_model_len: int = 64,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
) -> int:
    return choose_num_blocks(
        CONFIG,
        block_size=block_size,
        dtype=dtype,
        kv_cache_bytes=kv_cache_bytes,
        max_num_requests=max_num_requests,
        max_model_len=max_model_len,
    )


def test_a_block_is_k_and_v_of_all_layers() -> None:
    assert block_bytes(CONFIG, 1, torch.float32) == TOKEN_BYTES
    assert block_bytes(CONFIG, 16, torch.float32) == 16 * TOKEN_BYTES
    assert block_bytes(CONFIG, 16, torch.bfloat16) == 8 * TOKEN_BYTES


def test_a_block_is_k_and_v_of_the_layers_that_keep_every_token() -> None:
    assert block_bytes(ROUTED, 16, torch.float32) == 16 * TOKEN_BYTES / 3
    layout = KVLayout.of(ROUTED, 16)
    assert (layout.plain, layout.routed, layout.slots_per_block) == ((1,), (0, 2), 16)
    assert [layout.blocks_for(n) for n in (0, 1, 8, 9, 16, 17)] == [0, 2, 2, 3, 3, 5]
    assert [KVLayout.of(CONFIG, 16).blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_with_depth_routers_everywhere_a_block_still_has_room_for_entries() -> None:
    depth = {"layers": [0, 1, 2], "capacity": 0.5}
    layout = KVLayout.of(make_config(depth_routing=depth), 4)
    assert (layout.plain, layout.slots_per_block) == ((), 4)
    assert layout.blocks_for(4) == 1 + 3


def test_storage_has_the_bytes_that_were_counted() -> None:
    for config in (CONFIG, ROUTED):
        storage = make_storage(config, num_blocks=5, block_size=4)
        held = storage.k.nbytes + storage.v.nbytes
        assert held == 5 * block_bytes(config, 4, torch.float32)
        assert storage.num_bytes == held + storage.index.nbytes


def test_storage_starts_finite_and_empty() -> None:
    storage = make_storage(CONFIG, num_blocks=2, block_size=4)
    assert storage.k.shape == storage.v.shape == (24, 2, 6)
    assert storage.index.shape == (0, 8)
    assert not storage.k.any()
    assert not storage.v.any()
    routed = make_storage(ROUTED, num_blocks=2, block_size=4)
    assert routed.k.shape == (8, 2, 6)
    assert routed.index.tolist() == [[-1] * 8] * 2


def test_layers_share_a_block_and_no_slot() -> None:
    storage = make_storage(CONFIG, num_blocks=3, block_size=2)
    slots = torch.tensor([0, 1, 6, 7, 12, 13])  # of the tokens of blocks 0, 1 and 2
    for layer in range(3):
        storage.keys(layer)[slots] += 10.0**layer
        storage.values(layer)[slots] -= 10.0**layer
    assert storage.k[:, 0, 0].tolist() == [1, 1, 10, 10, 100, 100] * 3
    assert torch.equal(storage.v, -storage.k)


def test_a_copy_of_a_block_is_one_of_all_layers() -> None:
    storage = make_storage(CONFIG, num_blocks=3, block_size=2)
    storage.k[:] = torch.arange(18.0).view(18, 1, 1)
    storage.copy_blocks([(2, 0)])
    assert storage.k[:, 0, 0].tolist() == [*range(12, 18), *range(6, 12), *range(12, 18)]
    storage.copy_blocks([])


def test_a_copy_shares_the_entries_of_its_tokens() -> None:
    storage = make_storage(ROUTED, num_blocks=3, block_size=2)
    storage.k[:] = torch.arange(6.0).view(6, 1, 1)
    storage.index[0, :2] = torch.tensor([5, -1])
    storage.copy_blocks([(0, 1)])
    assert storage.k[:, 0, 0].tolist() == [0, 1, 0, 1, 4, 5]
    assert storage.index[0].tolist() == [5, -1, 5, -1, -1, -1]


def test_by_default_every_running_request_has_room_for_a_context() -> None:
    assert num_blocks(max_num_requests=3, max_model_len=64) == 3 * 16
    assert num_blocks(max_num_requests=3, max_model_len=65) == 3 * 17


def test_the_default_is_bounded_but_holds_one_whole_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = block_bytes(CONFIG, 4, torch.float32)
    monkeypatch.setattr(kv_storage, "DEFAULT_BYTES", 20 * size + size // 2)
    assert num_blocks(max_num_requests=2) == 20
    monkeypatch.setattr(kv_storage, "DEFAULT_BYTES", 3 * size)
    assert num_blocks(max_num_requests=2) == 16


def test_bytes_that_are_given_are_used_up_and_never_exceeded() -> None:
    size = block_bytes(CONFIG, 4, torch.float32)
    assert num_blocks(kv_cache_bytes=size) == 1
    assert num_blocks(kv_cache_bytes=7 * size - 1) == 6
    assert num_blocks(kv_cache_bytes=7 * size, dtype=torch.bfloat16) == 14
    assert num_blocks(kv_cache_bytes=1000 * size, max_num_requests=1) == 1000


def test_less_than_a_block_is_refused() -> None:
    size = block_bytes(CONFIG, 4, torch.float32)
    with pytest.raises(
        ConfigError, match=f"kv_cache_bytes {size - 1} is less than one block, {size} bytes"
    ):
        num_blocks(kv_cache_bytes=size - 1)
