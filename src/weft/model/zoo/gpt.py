"""A plain GPT of any depth: the chain on which graph pipelines can win nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.model.zoo.layers import TransformerLayer, token_cross_entropy, token_ids
from weft.model.zoo.registry import ZooModel


class GPT(nn.Module):
    """Token and position embeddings, causal layers, a head that may be tied: ids -> logits."""

    def __init__(
        self, num_layers: int, hidden: int, num_heads: int, vocab: int, seq: int, tied: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Parameter(torch.zeros(seq, hidden))
        self.layers = nn.Sequential(
            *(
                TransformerLayer(hidden, num_heads, 4 * hidden, causal=True)
                for _ in range(num_layers)
            )
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits (B, S, vocab)."""
        x_BSD = self.tokens(ids_BS) + self.positions
        return self.head(self.norm(self.layers(x_BSD)))


def gpt(
    num_layers: int = 24,
    hidden: int = 1024,
    num_heads: int = 16,
    vocab: int = 50304,
    seq: int = 1024,
    tied: bool = False,
) -> ZooModel:
    """A GPT; the defaults are GPT-2 medium's. On a command line `gpt-96` has 96 layers."""
    return ZooModel(
        name=f"gpt-{num_layers}",
        module=GPT(num_layers, hidden, num_heads, vocab, seq, tied),
        example_inputs=(token_ids(2, seq),),
        targets=(token_ids(2, seq),),
        loss=token_cross_entropy,
        batch_size=512,
    )
