"""One iteration as the decoder sees it: tokens in a row, and where each may look and must write.

Shape legend: T tokens, R rows, P pages of a table, D head_dim, Hkv key-value heads, N pages of the
arena, B tokens of a page, L layers of a cache group.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from weft.model.adapters.table import GroupedRows
from weft.model.adapters.weights import AdapterWeights
from weft.model.finetune.dropout import DropoutKey


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRow:
    """A row of several tokens of one sequence: part of its prompt, or all of it."""

    row: int
    begin: int
    """First token within the batch."""
    end: int
    first_prefix: int
    """Cached tokens that the row's first token sees, itself included."""
    context: int
    """Cached tokens that the row's last token sees, itself included."""
    is_training: bool = False
    """A window of a sample in training: kernels may take it apart from the others."""


@dataclass(kw_only=True, slots=True)
class GroupStep:
    """One cache group's view of an iteration; the same for all layers of the group."""

    page_tables: Tensor
    """[R, P] int32."""
    write_slots: Tensor
    """[T] int64: page * B + offset."""
    page_tokens: int
    """B."""
    window: int | None
    scratch: dict[str, Any] = field(default_factory=dict[str, Any])
    """What a kernel set derives once and uses in every layer of the group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BypassGroup:
    """Tokens of the iteration that pass through one adapter."""

    rows: slice | Tensor
    """A range of tokens (begin and end given), or their numbers [n] int64."""
    adapter: AdapterWeights
    dropout: DropoutKey | None = None
    """Masks of a LoRA's input, for a sample in training; None drops nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BypassStep:
    """Which tokens pass through which adapters; no token is in two groups."""

    groups: tuple[BypassGroup, ...]
    rows: GroupedRows | None = None
    """Tokens whose adapters the grouped kernels find through a table."""


class Taps(Protocol):
    """Takes tensors of the layers for some of the tokens: what a backward pass will read.

    Names are those of `weft.graph.layer_graph`, without `query` and `keys`, which only the
    attention kernels see: `query_raw` or `query_flat`, and the pages, lead to them.
    """

    @property
    def rows(self) -> slice:
        """Tokens of the iteration, as a range; nothing is kept of the others."""
        ...

    def wants(self, layer: int) -> Collection[str]:
        """Names that it takes of a layer; the same all through a pass."""
        ...

    def keep(self, layer: int, name: str, rows: slice, value: Tensor) -> None:
        """Take a tensor [end - begin, width] of the tokens `rows` of the iteration.

        It may be overwritten as soon as this returns: copy it.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardStep:
    """The tokens of one iteration and their geometry. Single-token rows come first."""

    token_ids: Tensor
    """[T] int32."""
    positions: Tensor
    """[T] int32."""
    prefix_lens: Tensor
    """[T] int32: cached tokens that a token sees, itself included."""
    num_decodes: int
    """Rows 0 to num_decodes hold one token each, token r being row r's."""
    max_decode_context: int
    """The largest prefix_lens among them."""
    chunks: tuple[ChunkRow, ...]
    groups: tuple[GroupStep, ...]
    bypass: BypassStep | None = None
    """None where all tokens see the bare model."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeRows:
    """cos and sin of the iteration's positions: [T, D/2] each, in the model's dtype."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayer:
    """Keys and values of one layer in the arena: views, strided by the arena's pages."""

    keys: Tensor
    """[N, Hkv, B, D]."""
    values: Tensor
    """[N, Hkv, B, D]."""


def kv_layers(group: Tensor) -> tuple[KvLayer, ...]:
    """Split a cache group's view [N, L, 2, Hkv, B, D] into its layers."""
    return tuple(
        KvLayer(keys=group[:, layer, 0], values=group[:, layer, 1])
        for layer in range(group.shape[1])
    )
