"""transformers on the device, by `generate` as its documentation uses it, greedy.

A batch of one with a static cache, with which `generate` compiles the forward pass on a GPU
(torch.compile, "reduce-overhead": CUDA graphs); larger ones eagerly with a growing cache. Of its
ways to compute experts the quickest of those that run is taken for each batch size.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers  # type: ignore[import-not-found]

from momaserve_bench.gpu.device import Device

_WAYS = ("grouped_mm", "batched_mm", "eager")


class _Clock:
    """A stopping criterion that never stops; notes when the first token was there."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.first_s: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        if self.first_s is None:
            self._device.synchronize()
            self.first_s = self._device.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersPeer:
    """A Llama or Mixtral of random weights."""

    name = "transformers"

    def __init__(
        self, config: dict[str, Any], device: Device, dtype: torch.dtype, *, is_compiled: bool
    ) -> None:
        """
        Args:
            config: as `peers.shapes.peer_config` makes it.
            is_compiled: whether a batch of one runs compiled.
        """
        self._device = device
        self._is_compiled = is_compiled
        known = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
        found = transformers.AutoConfig.for_model(known.pop("model_type"), **known)
        with torch.device(device.torch_device):
            self._model = transformers.AutoModelForCausalLM.from_config(found, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None  # nothing ends an answer early
        self._model.generation_config.pad_token_id = 1
        self._has_experts = any(hasattr(m, "gate_up_proj") for m in self._model.modules())
        self._ways: dict[int, str] = {}
        self.settings: dict[str, Any] = {
            "version": str(transformers.__version__),
            "num_parameters": int(self._model.num_parameters()),
            "attention": self._model.config._attn_implementation,
            "compiled_batch_1": is_compiled,
            "experts": self._ways,
        }

    def run(self, prompts: list[list[int]], num_new: int) -> float:
        """Decode tokens/s: those after every row's first, over the time from then to the last."""
        if self._has_experts:
            size = len(prompts)
            if size not in self._ways:
                self._ways[size] = self._quickest(prompts, num_new)
            self._model.set_experts_implementation(self._ways[size])
        return self._generate(prompts, num_new)

    def _quickest(self, prompts: list[list[int]], num_new: int) -> str:
        rates: dict[str, float] = {}
        for way in _WAYS:
            try:
                self._model.set_experts_implementation(way)
                self._generate(prompts, min(num_new, 4))  # the first time costs more
                rates[way] = self._generate(prompts, num_new)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                last = error
        if not rates:
            raise RuntimeError(f"none of its ways to compute experts runs: {last}")
        return max(rates, key=rates.__getitem__)

    @torch.no_grad()  # inference mode and compiled graphs do not always go together
    def _generate(self, prompts: list[list[int]], num_new: int) -> float:
        clock = _Clock(self._device)
        ids = torch.tensor(prompts, device=self._device.torch_device)
        is_static = self._is_compiled and len(prompts) == 1
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            stopping_criteria=[clock],
            cache_implementation="static" if is_static else None,
        )
        self._device.synchronize()
        last_s = self._device.now()
        if output.shape[1] != ids.shape[1] + num_new or clock.first_s is None:
            made = output.shape[1] - ids.shape[1]
            raise RuntimeError(f"it made {made} tokens, {num_new} were asked for")
        return len(prompts) * (num_new - 1) / (last_s - clock.first_s)
