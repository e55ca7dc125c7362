"""DLRM with GraphPipe's configuration (arXiv 2406.17145, A.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.model.zoo.layers import feed_forward
from weft.model.zoo.registry import ZooModel


class BagOfEntries(nn.Module):
    """Looks up a bag of ids (B, N) and concatenates their entries: (B, N * width)."""

    def __init__(self, num_entries: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_entries, width)

    def forward(self, ids_BN: Tensor) -> Tensor:
        """The entries of each bag, side by side."""
        return self.table(ids_BN).flatten(1)


class DeepRecommender(nn.Module):
    """Dense and sparse branches, joined by a concat, then dense layers to one logit."""

    def __init__(
        self,
        num_dense: int,
        num_sparse: int,
        width: int,
        num_layers: int,
        num_entries: int,
        embedding_width: int,
        bag_size: int,
        num_top_layers: int,
        sum_bags: bool,
    ) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.dense = nn.ModuleList(feed_forward(width, width, num_layers) for _ in range(num_dense))
        self.sparse = nn.ModuleList(
            nn.EmbeddingBag(num_entries, embedding_width, mode="sum")
            if sum_bags
            else BagOfEntries(num_entries, embedding_width)
            for _ in range(num_sparse)
        )
        sparse_width = embedding_width * (1 if sum_bags else bag_size)
        joined = num_dense * width + num_sparse * sparse_width
        self.top = feed_forward(joined, width, num_top_layers)
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features (B, width) for each dense branch, then ids (B, bag) for each sparse one."""
        outputs: list[Tensor] = []
        for i, branch in enumerate((*self.dense, *self.sparse)):
            outputs.append(branch(inputs[i]))
        return self.head(self.top(torch.cat(outputs, dim=-1))).squeeze(-1)


def dlrm(
    num_dense: int = 7,
    num_sparse: int = 7,
    width: int = 4096,
    num_layers: int = 4,
    num_entries: int = 1_000_000,
    embedding_width: int = 64,
    bag_size: int = 100,
    num_top_layers: int = 2,
    sum_bags: bool = False,
) -> ZooModel:
    """The paper's DLRM: 7 dense branches of 4 layers of 4096, 7 tables of 1 M x 64, bags of 100.

    Entries of a bag are concatenated, as the paper says; `sum_bags=True` adds them, as its program
    does. The number of layers after the join is not given there: `num_top_layers`.
    """
    module = DeepRecommender(
        num_dense,
        num_sparse,
        width,
        num_layers,
        num_entries,
        embedding_width,
        bag_size,
        num_top_layers,
        sum_bags,
    )
    dense = tuple(torch.zeros(2, width) for _ in range(num_dense))
    sparse = tuple(torch.zeros(2, bag_size, dtype=torch.long) for _ in range(num_sparse))
    return ZooModel(
        name="dlrm",
        module=module,
        example_inputs=(*dense, *sparse),
        targets=(torch.zeros(2),),
        loss=functional.binary_cross_entropy_with_logits,
        batch_size=1024,
    )
