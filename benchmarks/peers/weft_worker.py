"""Ours: `weft.LLM`, in-process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from protocol import serve

import weft
from weft import LLM, SamplingParams


class WeftEngine:
    """Drives the public offline interface, nothing deeper."""

    def load(self, spec: dict[str, Any]) -> dict[str, str]:
        self._llm = LLM(
            spec["model"],
            dtype=spec["dtype"],
            device="cpu",
            max_model_len=spec["max_model_len"],
            max_num_seqs=spec["max_num_seqs"],
            kv_cache_memory_bytes=spec["kv_cache_memory_bytes"],
            num_threads=spec["num_threads"],
            seed=0,
            **spec.get("options", {}),
        )
        return {"weft": weft.__version__, "torch": torch.__version__}

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
                for count in num_new_tokens
            ],
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(WeftEngine())
