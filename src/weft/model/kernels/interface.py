"""What a decoder needs done that depends on the device: one protocol, a set of kernels for each.

Shape legend: T tokens, D head_dim, Hq query heads, Hkv key-value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from weft.model.forward_step import ForwardStep, GroupStep, KvLayer, RopeRows
from weft.model.linear import LinearWeight


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """The heads of every layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorms:
    """RMS norm weights over head_dim for queries and keys: [D] each (Qwen3)."""

    query: Tensor
    key: Tensor


class Kernels(Protocol):
    """One implementation of the operations between the linear layers."""

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> LinearWeight:
        """Adopt a weight [N, K] in this set's fastest form."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension; the mean is taken in float32 or wider."""
        ...

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rope: RopeRows,
        kv: KvLayer,
        step: ForwardStep,
        group: GroupStep,
    ) -> Tensor:
        """Attend with every token of an iteration: [T, (Hq + 2 Hkv) D] to [T, Hq D].

        Norms (where given) and turns queries and keys, writes keys and values to their slots, then
        lets each token see its cached prefix, or the last `group.window` tokens of it. A result
        depends on nothing that lies in the arena beyond the prefix, not even on NaNs there.
        """
        ...
