"""A U-Net (arXiv 1505.04597) with long skip connections: a graph that is not series-parallel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.model.zoo.registry import ZooModel


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with group norm and SiLU: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same height and width."""
        x = functional.silu(self.norm1(self.conv1(x)))
        return functional.silu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Contracting and expanding paths; each level of the first feeds its twin on the second."""

    def __init__(self, channels: int, num_levels: int, image_channels: int) -> None:
        super().__init__()
        widths = [channels * 2**i for i in range(num_levels)]
        self.down = nn.ModuleList(
            ConvBlock(w_in, w) for w_in, w in zip([image_channels, *widths], widths, strict=False)
        )
        self.middle = ConvBlock(widths[-1], 2 * widths[-1])
        self.upscale = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths)
        )
        self.up = nn.ModuleList(ConvBlock(2 * w, w) for w in reversed(widths))
        self.head = nn.Conv2d(channels, image_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """An image of the input's shape."""
        skips: list[Tensor] = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.middle(x)
        for upscale, block, skip in zip(self.upscale, self.up, reversed(skips), strict=True):
            x = block(torch.cat([skip, upscale(x)], dim=1))
        return self.head(x)


def unet(
    channels: int = 64, num_levels: int = 4, image: int = 128, image_channels: int = 3
) -> ZooModel:
    """A U-Net of four levels, 64 to 1024 channels, on 128 x 128 images."""
    return ZooModel(
        name="unet",
        module=UNet(channels, num_levels, image_channels),
        example_inputs=(torch.zeros(2, image_channels, image, image),),
        targets=(torch.zeros(2, image_channels, image, image),),
        loss=functional.mse_loss,
        batch_size=64,
    )
