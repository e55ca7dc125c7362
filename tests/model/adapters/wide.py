"""Makes transformers compute in float64 throughout.

Its norms and its softmax fall to float32 whatever the model's dtype, which hides errors of ours
below 1e-6. Inside `wide_transformers` the name `torch.float32` means float64 in its model files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

_FILES = (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3)


class _WideTorch:
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def wide_transformers() -> Iterator[None]:
    """Within it, and only for calls within it."""
    patches = [mock.patch.object(file, "torch", _WideTorch()) for file in _FILES]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
