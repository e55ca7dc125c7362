"""vLLM's CPU build, in-process, on every core that the parent grants.

By default vLLM keeps one core for its front end and binds its threads to the rest, which on two
cores is half the machine; the parent sets VLLM_CPU_OMP_THREADS_BIND and
VLLM_CPU_NUM_OF_RESERVED_CPU so that it computes on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import vllm
from protocol import serve


class VllmEngine:
    """Compiled as vLLM chooses by default; prefix caching off, as every prompt is new anyway."""

    def load(self, spec: dict[str, Any]) -> dict[str, str]:
        self._llm = vllm.LLM(
            model=spec["model"],
            dtype=spec["dtype"],
            max_model_len=spec["max_model_len"],
            max_num_seqs=spec["max_num_seqs"],
            kv_cache_memory_bytes=spec["kv_cache_memory_bytes"],
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
            **spec.get("options", {}),
        )
        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                vllm.SamplingParams(
                    temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
                )
                for count in num_new_tokens
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(VllmEngine())
