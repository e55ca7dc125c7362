"""onnxruntime-genai: a static batch that runs until its longest member ends.

Prompts of unequal length are padded on the right: its attention on CPU counts valid tokens from the
left, and with padding on the left every shorter row came out wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime_genai as og
from protocol import serve

PAD_TOKEN_ID = 2
"""What the converter writes into genai_config.json; prompts of the benchmark never hold it."""


class OrtGenaiEngine:
    """One `Generator` a batch; threads come from genai_config.json, written by the converter."""

    def load(self, spec: dict[str, Any]) -> dict[str, str]:
        self._model = og.Model(spec["artifact"])
        return {"onnxruntime-genai": og.__version__}

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        total = longest + max(num_new_tokens)
        ids = np.full((len(prompts), longest), PAD_TOKEN_ID, dtype=np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=len(prompts), max_length=total, min_length=total, do_sample=False
        )
        generator = og.Generator(self._model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        rows = [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]
        return [row[:count] for row, count in zip(rows, num_new_tokens, strict=True)]


if __name__ == "__main__":
    serve(OrtGenaiEngine())
