"""How keys and values lie in the arena: cache groups, page sizes, views.

The arena is one uint8 tensor [num_pages, page_bytes]. Page 0 is the null page. A cache group sees
it as [num_pages, layers, 2, kv heads, page_tokens, head_dim], 2 being keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.engine.batch import CacheGroup
from weft.engine.kv_cache import pages_for_sequence
from weft.model.config import ModelConfig

PAGE_TOKENS = 16
"""Of the group with most bytes a token; others hold a power of two times as many."""
_ALIGNMENT_BYTES = 64
"""Pages start on cache lines, so that vector loads never straddle them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """The cut of one model's cache."""

    groups: tuple[CacheGroup, ...]
    page_bytes: int
    layer_groups: tuple[int, ...]
    """For each layer, the index of its group."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def group_view(self, arena: Tensor, group: int) -> Tensor:
        """The arena as one group sees it."""
        spec = self.groups[group]
        shape = (len(spec.layers), 2, self.num_kv_heads, spec.page_tokens, self.head_dim)
        used = torch.Size(shape).numel()
        return arena.view(self.dtype)[:, :used].unflatten(1, shape)

    def pages_for_sequence(self, num_tokens: int, chunk: int) -> int:
        """Most pages that one sequence holds at once, computed `chunk` tokens at a time."""
        return pages_for_sequence(self.groups, num_tokens, chunk)


def kv_layout(config: ModelConfig, dtype: torch.dtype) -> KvLayout:
    """Group the layers by window and size the pages."""
    layers_of: dict[int | None, list[int]] = {}
    for layer, window in enumerate(config.windows):
        layers_of.setdefault(window, []).append(layer)
    layer_bytes = 2 * config.kv_size * dtype.itemsize
    page_bytes = PAGE_TOKENS * layer_bytes * max(len(layers) for layers in layers_of.values())
    page_bytes = -(-page_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    groups = tuple(
        CacheGroup(
            layers=tuple(layers),
            page_tokens=_largest_page(layer_bytes * len(layers), page_bytes),
            window=window,
        )
        for window, layers in layers_of.items()
    )
    return KvLayout(
        groups=groups,
        page_bytes=page_bytes,
        layer_groups=_layer_groups(groups, config.num_layers),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )


def _largest_page(token_bytes: int, page_bytes: int) -> int:
    tokens = PAGE_TOKENS
    while 2 * tokens * token_bytes <= page_bytes:
        tokens *= 2
    return tokens


def _layer_groups(groups: Sequence[CacheGroup], num_layers: int) -> tuple[int, ...]:
    of_layer = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    return tuple(of_layer[layer] for layer in range(num_layers))
