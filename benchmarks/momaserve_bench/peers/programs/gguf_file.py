"""A Llama checkpoint as a GGUF file without a vocabulary. Needs numpy and gguf, not torch."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Of a layer's tensors, from the checkpoint's names to the file's."""


def write_gguf(checkpoint: Path, path: Path, dtype: str) -> None:
    """Write the weights of `checkpoint` (safetensors, bfloat16) in `dtype` unless it is there.

    The file takes its name last, so one that has it is whole and belongs to the checkpoint's
    present `config.json`, which is newer in a checkpoint that was written anew.

    Args:
        dtype: bfloat16 or float32, of the matrices; norms are float32.
    """
    described = checkpoint / "config.json"
    if path.exists() and path.stat().st_mtime >= described.stat().st_mtime:
        return
    config = json.loads(described.read_text(encoding="utf-8"))
    unfinished = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    is_wide = dtype == "float32"
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.ALL_F32 if is_wide else kinds.MOSTLY_BF16)
    for name, stored in _tensors(checkpoint):
        target, values = _renamed(name), stored
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if name.endswith(f"self_attn.{part}_proj.weight"):
                values = _interleaved(stored, config[heads])
        if values.ndim == 1 or is_wide:
            writer.add_tensor(target, (values.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(values).view(np.uint8)
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


def _renamed(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, *part, _ = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(part)]}.weight"


def _interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of queries or keys in llama.cpp's order: a rotated pair is two neighbours there, and
    the same place in the two halves of a head in the checkpoint."""
    rows, columns = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and bits (uint16) of every bfloat16 tensor of a checkpoint."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + length])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, shape = 8 + length + entry["data_offsets"][0], entry["shape"]
            bits = np.frombuffer(mapped, np.uint16, math.prod(shape), start)
            yield name, bits.reshape(shape)
