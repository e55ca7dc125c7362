"""What lives on one device and outlives executors: weights, and the arena of pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.base.errors import OutOfMemoryError
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder
from weft.model.forward_step import KvLayer, kv_layers
from weft.model.kernels.interface import Kernels
from weft.model.rope import rope_table
from weft.model.weights import DecoderWeights
from weft.runtime.kv_layout import KvLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceContext:
    """One model on one device. A restarted executor adopts it with its pages as they are."""

    config: ModelConfig
    decoder: Decoder
    layout: KvLayout
    arena: Tensor
    """[num_pages, page_bytes] uint8."""
    kv: tuple[KvLayer, ...]
    """The arena as each layer sees it."""
    max_model_len: int

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.arena.device

    @property
    def num_pages(self) -> int:
        """Pages of the arena, the null page included."""
        return self.arena.shape[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of weights and arena."""
        return self.decoder.weights.size_bytes + self.arena.numel()


def create_context(
    config: ModelConfig,
    weights: DecoderWeights,
    kernels: Kernels,
    layout: KvLayout,
    *,
    num_pages: int,
    max_model_len: int,
    device: torch.device | str = "cpu",
) -> DeviceContext:
    """Allocate the arena, zeroed, and put the decoder together.

    Raises:
        OutOfMemoryError: the device does not give the arena's bytes.
    """
    try:
        arena = torch.zeros((num_pages, layout.page_bytes), dtype=torch.uint8, device=device)
    except RuntimeError as error:  # so does the CPU's allocator; CUDA's raises a subclass
        raise OutOfMemoryError(
            f"{device} does not give {num_pages * layout.page_bytes} bytes for the KV cache: lower "
            f"kv_cache_memory_bytes ({error})"
        ) from error
    layers: list[KvLayer | None] = [None] * config.num_layers
    for index, group in enumerate(layout.groups):
        views = kv_layers(layout.group_view(arena, index))
        for layer, view in zip(group.layers, views, strict=True):
            layers[layer] = view
    decoder = Decoder(
        config,
        weights,
        kernels,
        rope_table(config.rope, config.head_dim, max_model_len, layout.dtype, device),
        layout.layer_groups,
    )
    return DeviceContext(
        config=config,
        decoder=decoder,
        layout=layout,
        arena=arena,
        kv=tuple(layer for layer in layers if layer is not None),
        max_model_len=max_model_len,
    )
