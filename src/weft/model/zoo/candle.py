"""CANDLE-Uno with GraphPipe's configuration (arXiv 2406.17145, A.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.base.errors import ConfigError
from weft.model.zoo.layers import feed_forward
from weft.model.zoo.registry import ZooModel

# Feature widths of the published strategy: one RNA sequence, three drugs' descriptors and
# fingerprints; and two doses that join without an encoder.
_UNO_WIDTHS = (942, 5270, 5270, 5270, 2048, 2048, 2048)
_NUM_DOSES = 2


class DrugResponse(nn.Module):
    """Feature encoders joined by a concat, then dense layers to one response."""

    def __init__(
        self, input_widths: tuple[int, ...], width: int, num_layers: int, num_doses: int
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(feed_forward(w, width, num_layers) for w in input_widths)
        self.top = feed_forward(len(input_widths) * width + num_doses, width, 2)
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """One feature (B, w) an encoder, then the doses (B, 1); returns (B,)."""
        encoded = [encoder(inputs[i]) for i, encoder in enumerate(self.encoders)]
        joined = torch.cat([*encoded, *inputs[len(encoded) :]], dim=-1)
        return self.head(self.top(joined)).squeeze(-1)


def candle_uno(
    num_branches: int = 7, width: int = 4096, num_layers: int = 4, published_inputs: bool = False
) -> ZooModel:
    """The paper's CANDLE-Uno: 7 branches of 4 dense layers of 4096, then 2 more and a head.

    Every branch takes 4096 features, as in the paper's branch sweep (`num_branches`);
    `published_inputs=True` takes the seven feature widths and two doses of its published strategy.
    """
    if published_inputs and num_branches != len(_UNO_WIDTHS):
        raise ConfigError(
            f"published_inputs names {len(_UNO_WIDTHS)} features, but num_branches is "
            f"{num_branches}; leave one of the two at its default"
        )
    widths = _UNO_WIDTHS if published_inputs else (width,) * num_branches
    num_doses = _NUM_DOSES if published_inputs else 0
    inputs = [torch.zeros(2, w) for w in widths] + [torch.zeros(2, 1)] * num_doses
    return ZooModel(
        name="candle-uno",
        module=DrugResponse(widths, width, num_layers, num_doses),
        example_inputs=tuple(inputs),
        targets=(torch.zeros(2),),
        loss=functional.mse_loss,
        batch_size=1024,
    )
