"""A directory with config.json and weights only, served by token ids and compared over HTTP."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import start_server, stop_server
from tests.reference.checkpoints import CASES, random_checkpoint, sample_ids
from tests.reference.moma_float64 import Policy, load_checkpoint, token_log_probs


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        ("4t4i_post", "causal"),
        ("4t4i_post", "expert_choice"),
        ("depth_4t4i_pre", "causal"),
        ("tied_pre", "expert_choice"),
    ],
)
def test_log_probabilities_over_http(tmp_path: Path, case: str, policy: Policy) -> None:
    random_checkpoint(tmp_path, seed=1, **CASES[case])
    config, weights = load_checkpoint(tmp_path)
    ids = sample_ids(config, 3)
    server = start_server(str(tmp_path), "--prompt-routing", policy, "--served-model-name", "bare")
    try:
        body = {"model": "bare", "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        words = httpx.post(
            f"{server.url}/v1/completions", json={"model": "bare", "prompt": "hello"}, timeout=60
        )
    finally:
        assert stop_server(server) == 0
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]
    first, *got = choice["logprobs"]["token_logprobs"]
    assert first is None
    wanted = token_log_probs(config, weights, ids, policy=policy)[1:]
    assert got == pytest.approx(wanted, abs=1e-3)
    assert all(math.isfinite(value) for value in got)
    assert words.status_code == 400
    assert "tokenizer.json" in words.json()["error"]["message"]


def serve_failure(directory: Path, *arguments: str) -> str:
    """Standard error of a server that must refuse to start, with exit code 1."""
    command = [sys.executable, "-m", "momaserve_server", "serve", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_broken_checkpoints_end_with_one_clear_line(tmp_path: Path) -> None:
    assert "nowhere" in serve_failure(tmp_path / "nowhere")
    random_checkpoint(tmp_path, seed=1, **CASES["4t4i_post"])
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in serve_failure(tmp_path)
    weights.write_bytes(whole)
    config = tmp_path / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"hidden_size"', '"hiden_size"', 1), encoding="utf-8")
    assert "hiden_size" in serve_failure(tmp_path)
