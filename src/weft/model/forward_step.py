"""One iteration as the decoder sees it: tokens in a row, and where each may look and must write.

Shape legend: T tokens, R rows, P pages of a table, D head_dim, Hkv key-value heads, N pages of the
arena, B tokens of a page, L layers of a cache group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


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
    scratch: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What a kernel set derives once and uses in every layer of the group."""


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
