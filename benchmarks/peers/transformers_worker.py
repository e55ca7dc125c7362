"""transformers: `generate` on a padded batch, or its continuous batching (`spec["mode"]`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


class TransformersEngine:
    """Greedy with EOS switched off; a padded batch runs until its longest member has finished."""

    def load(self, spec: dict[str, Any]) -> dict[str, str]:
        torch.set_num_threads(spec["num_threads"])
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=getattr(torch, spec["dtype"])
        ).eval()
        self._continuous = spec.get("mode") == "continuous"
        # Ids that no vocabulary holds: nothing stops early and no row is filled with padding.
        self._config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        if self._continuous:
            self._start_manager(spec)
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def _start_manager(self, spec: dict[str, Any]) -> None:
        """Size the cache for the workload: the default takes most of the machine's free memory."""
        page_size = 32
        self._manager = self._model.init_continuous_batching(
            generation_config=self._config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=spec["num_cache_tokens"] // page_size,
                max_batch_tokens=512,
                max_requests_per_batch=spec["max_num_seqs"],
                allow_block_sharing=False,
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        self._manager.start()

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        if self._continuous:
            return self._generate_continuous(prompts, num_new_tokens)
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._config,
            max_new_tokens=max(num_new_tokens),
        )
        rows = out[:, longest:].tolist()
        return [row[:count] for row, count in zip(rows, num_new_tokens, strict=True)]

    def top2_gap(self, tokens: list[int]) -> float:
        """Logit gap between the two likeliest next tokens."""
        top = self._model(torch.tensor([tokens])).logits[0, -1].topk(2).values
        return float(top[0] - top[1])

    def _generate_continuous(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        order = [
            self._manager.add_request(list(prompt), max_new_tokens=count)
            for prompt, count in zip(prompts, num_new_tokens, strict=True)
        ]
        tokens: dict[str, list[int]] = {}
        while len(tokens) < len(order):
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("continuous batching stopped without an answer")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                tokens[result.request_id] = list(result.generated_tokens)
        return [tokens[request_id] for request_id in order]


if __name__ == "__main__":
    serve(TransformersEngine())
