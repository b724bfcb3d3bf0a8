"""transformers as its documentation uses it: `generate`, greedy, scaled-dot-product attention.

Of its ways to compute experts the quicker is taken for each shape of work, judged by the first
run of that shape, which is not counted.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers  # type: ignore[import-not-found]
from torch.nn import functional

_WAYS = ("grouped_mm", "eager")
"""`batched_mm` copies an expert for every token, which takes gigabytes for a prompt."""
_ROW_BYTES = 16
"""What grouped_mm wants the rows of its operands to be a multiple of."""


class _Clock:
    """A stopping criterion that never stops: `generate` calls it after every token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.started)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=getattr(torch, job["dtype"])
        ).eval()
        model.generation_config.eos_token_id = None  # nothing ends an answer early
        model.generation_config.pad_token_id = 1
        num_parameters = model.num_parameters()
        self._experts = [m for m in model.modules() if hasattr(m, "gate_up_proj")]
        for experts in self._experts:
            _pad(experts)
        self._model = model
        self._ways: dict[str, str] = {}
        self.versions = {
            "transformers": str(transformers.__version__),
            "torch": str(torch.__version__),
        }
        self.settings = {
            "attention": model.config._attn_implementation,
            "experts": self._ways,
            "cache": "dynamic",
            "compiled": False,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_parameters": num_parameters,
            "threads": torch.get_num_threads(),
        }

    def run(
        self, prompts: list[list[int]], num_new: int, pictures: list[bool]
    ) -> tuple[list[list[int]], list[list[float]]]:
        shape = f"{len(prompts)}x{len(prompts[0])}"
        if self._experts:
            if shape not in self._ways:
                self._ways[shape] = self._quickest(prompts, num_new)
            self._model.set_experts_implementation(self._ways[shape])
        return self._generate(prompts, num_new)

    def _quickest(self, prompts: list[list[int]], num_new: int) -> str:
        took: dict[str, float] = {}
        for way in _WAYS:
            self._model.set_experts_implementation(way)
            self._generate(prompts, min(num_new, 2))  # the first time costs more
            took[way] = self._generate(prompts, num_new)[1][0][-1]
        return min(took, key=took.__getitem__)

    def _generate(
        self, prompts: list[list[int]], num_new: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        clock = _Clock()
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                do_sample=False,
                stopping_criteria=[clock],
            )
        new: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return new, [list(clock.times) for _ in prompts]


def _pad(experts: Any) -> None:
    """Fill the experts' hidden units up with zeros to what grouped_mm can take: same function.

    `gate_up_proj` is [E, 2 F, D], `down_proj` [E, D, F].
    """
    both, down = experts.gate_up_proj.data, experts.down_proj.data
    missing = -down.shape[2] % (_ROW_BYTES // down.element_size())
    if missing:
        halves = [functional.pad(half, (0, 0, 0, missing)) for half in both.chunk(2, dim=1)]
        experts.gate_up_proj.data = torch.cat(halves, dim=1)
        experts.down_proj.data = functional.pad(down, (0, missing))
