"""How much K/V memory there is, and how it is laid out."""

from __future__ import annotations

import pytest
import torch

from momaserve.errors import ConfigError
from momaserve.runner import kv_storage
from momaserve.runner.kv_storage import block_bytes, choose_num_blocks
from tests.models.factory import make_config
from tests.runner.factory import make_storage

CONFIG = make_config()  # 3 layers, 2 kv heads of 6
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


def test_storage_has_the_bytes_that_were_counted() -> None:
    storage = make_storage(CONFIG, num_blocks=5, block_size=4)
    held = storage.k.nbytes + storage.v.nbytes
    assert held == 5 * block_bytes(CONFIG, 4, torch.float32)


def test_storage_starts_finite_and_marks_depth_routed_layers_only() -> None:
    storage = make_storage(CONFIG, num_blocks=2, block_size=4)
    assert storage.k.shape == storage.v.shape == (3, 8, 2, 6)
    assert not storage.k.any()
    assert not storage.v.any()
    assert {layer: taken.tolist() for layer, taken in storage.taken.items()} == {
        0: [False] * 8,
        2: [False] * 8,
    }
    assert make_storage(make_config(depth_routing=None)).taken == {}


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
