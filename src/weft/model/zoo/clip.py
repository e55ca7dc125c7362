"""A two-tower CLIP (arXiv 2103.00020, ViT-B/32): an image tower and a text tower, one loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.model.zoo.layers import TransformerLayer, token_ids
from weft.model.zoo.registry import ZooModel


class ImageTower(nn.Module):
    """Vision Transformer: (B, 3, image, image) -> (B, embedding)."""

    def __init__(
        self, image: int, patch: int, hidden: int, num_layers: int, num_heads: int, embedding: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, hidden, patch, stride=patch, bias=False)
        self.positions = nn.Parameter(torch.zeros((image // patch) ** 2, hidden))
        self.layers = nn.Sequential(
            *(TransformerLayer(hidden, num_heads, 4 * hidden) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(hidden)
        self.project = nn.Linear(hidden, embedding, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """One embedding an image: the mean over patches, projected."""
        x_BSD = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        return self.project(self.norm(self.layers(x_BSD).mean(1)))


class TextTower(nn.Module):
    """Causal Transformer: ids (B, S) -> (B, embedding), read at the last position."""

    def __init__(
        self, vocab: int, seq: int, hidden: int, num_layers: int, num_heads: int, embedding: int
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
        self.project = nn.Linear(hidden, embedding, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """One embedding a text."""
        x_BSD = self.layers(self.tokens(ids_BS) + self.positions)
        return self.project(self.norm(x_BSD[:, -1]))


class TwoTowers(nn.Module):
    """Both towers and the learned temperature; returns similarities (B, B)."""

    def __init__(self, image: ImageTower, text: TextTower) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.log_scale = nn.Parameter(torch.full((1,), 2.6592))

    def forward(self, image: Tensor, ids_BS: Tensor) -> Tensor:
        """Scaled cosine similarity of every image with every text of the micro-batch."""
        image_BE = functional.normalize(self.image(image), dim=-1)
        text_BE = functional.normalize(self.text(ids_BS), dim=-1)
        return self.log_scale.exp() * image_BE @ text_BE.t()


def contrastive_loss(similarity_BB: Tensor) -> Tensor:
    """Symmetric cross-entropy: each image to its text and back, within the micro-batch."""
    labels = torch.arange(similarity_BB.shape[0], device=similarity_BB.device)
    images = functional.cross_entropy(similarity_BB, labels)
    return (images + functional.cross_entropy(similarity_BB.t(), labels)) / 2


def clip(
    image: int = 224,
    patch: int = 32,
    image_hidden: int = 768,
    image_layers: int = 12,
    image_heads: int = 12,
    vocab: int = 49408,
    seq: int = 77,
    text_hidden: int = 512,
    text_layers: int = 12,
    text_heads: int = 8,
    embedding: int = 512,
) -> ZooModel:
    """CLIP ViT-B/32; the contrastive loss is over the micro-batch, not the mini-batch."""
    module = TwoTowers(
        ImageTower(image, patch, image_hidden, image_layers, image_heads, embedding),
        TextTower(vocab, seq, text_hidden, text_layers, text_heads, embedding),
    )
    return ZooModel(
        name="clip",
        module=module,
        example_inputs=(torch.zeros(2, 3, image, image), token_ids(2, seq)),
        loss=contrastive_loss,
        batch_size=1024,
    )
