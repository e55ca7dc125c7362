"""Layers that several zoo models share.

Shapes: B batch, S sequence, D model width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.base.errors import ConfigError


class SelfAttention(nn.Module):
    """Multi-head self-attention: (B, S, D) -> (B, S, D)."""

    def __init__(
        self, hidden: int, num_heads: int, *, causal: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        if hidden % num_heads:
            raise ConfigError(
                f"hidden size {hidden} is not divisible by num_heads {num_heads}; change either"
            )
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.out = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Attend within each sequence."""
        batch, seq, hidden = x_BSD.shape
        heads = self.qkv(x_BSD).view(batch, seq, 3, self.num_heads, hidden // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, seq, hidden))


class TransformerLayer(nn.Module):
    """Pre-norm Transformer layer: attention and a two-layer feed-forward, both residual."""

    def __init__(
        self, hidden: int, num_heads: int, ffn_hidden: int, *, causal: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attention = SelfAttention(hidden, num_heads, causal=causal)
        self.norm2 = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, ffn_hidden)
        self.down = nn.Linear(ffn_hidden, hidden)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """One layer, same shape."""
        x_BSD = x_BSD + self.attention(self.norm1(x_BSD))
        return x_BSD + self.down(functional.gelu(self.up(self.norm2(x_BSD))))


class BareTransformerLayer(nn.Module):
    """Attention and two dense layers with neither norm nor residual, as in GraphPipe's artifact."""

    def __init__(self, hidden: int, num_heads: int, ffn_hidden: int) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, num_heads, bias=False)
        self.up = nn.Linear(hidden, ffn_hidden, bias=False)
        self.down = nn.Linear(ffn_hidden, hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """One layer, same shape."""
        return self.down(functional.relu(self.up(self.attention(x_BSD))))


def feed_forward(width_in: int, width: int, num_layers: int) -> nn.Sequential:
    """`num_layers` dense layers of `width` with ReLU and no bias."""
    layers: list[nn.Module] = []
    for i in range(num_layers):
        layers += [nn.Linear(width_in if i == 0 else width, width, bias=False), nn.ReLU()]
    return nn.Sequential(*layers)


def token_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy of every token against its label."""
    return functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())


def token_ids(batch: int, seq: int) -> Tensor:
    """Example token ids (B, S) on the current default device."""
    return torch.zeros(batch, seq, dtype=torch.long)
