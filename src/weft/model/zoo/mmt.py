"""The multi-modal Transformer of GraphPipe (arXiv 2406.17145, A.2), and its case study (§7.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.model.zoo.layers import BareTransformerLayer, TransformerLayer
from weft.model.zoo.registry import ZooModel


class MultiModalTransformer(nn.Module):
    """Independent Transformer branches over (B, S, D) inputs, concatenated on the feature axis."""

    def __init__(
        self,
        num_branches: int,
        num_layers: int,
        hidden: int,
        num_heads: int,
        ffn_hidden: int,
        bare: bool,
    ) -> None:
        super().__init__()

        def layer() -> nn.Module:
            if bare:
                return BareTransformerLayer(hidden, num_heads, ffn_hidden)
            return TransformerLayer(hidden, num_heads, ffn_hidden)

        self.branches = nn.ModuleList(
            nn.Sequential(*(layer() for _ in range(num_layers))) for _ in range(num_branches)
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """One input a branch; returns (B, S, num_branches * D)."""
        outputs = [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]
        return torch.cat(outputs, dim=-1)


def mmt(
    num_branches: int = 4,
    num_layers: int = 8,
    hidden: int = 1024,
    num_heads: int = 16,
    ffn_hidden: int = 4096,
    seq: int = 256,
    bare: bool = False,
) -> ZooModel:
    """The paper's MMT: 4 branches of 8 layers, sequence 256, hidden 1024, 16 heads, FFN 4096.

    `bare=True` drops norms, residuals and biases, as the paper's published programs do; they also
    make the FFN as wide as the hidden size (`ffn_hidden=1024`).
    """
    module = MultiModalTransformer(num_branches, num_layers, hidden, num_heads, ffn_hidden, bare)
    return ZooModel(
        name="mmt",
        module=module,
        example_inputs=tuple(torch.zeros(2, seq, hidden) for _ in range(num_branches)),
        targets=(torch.zeros(2, seq, num_branches * hidden),),
        loss=functional.mse_loss,
        batch_size=128,
    )


def case_study(
    num_branches: int = 2,
    num_layers: int = 4,
    hidden: int = 1024,
    num_heads: int = 16,
    ffn_hidden: int = 4096,
    seq: int = 256,
    bare: bool = True,
) -> ZooModel:
    """The case study of §7.5: two branches of four {attention, two linear}, a concat; batch 64."""
    model = mmt(num_branches, num_layers, hidden, num_heads, ffn_hidden, seq, bare)
    return ZooModel(
        name="case-study",
        module=model.module,
        example_inputs=model.example_inputs,
        targets=model.targets,
        loss=model.loss,
        batch_size=64,
    )
