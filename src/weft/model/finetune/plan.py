"""Which layers a job's backward passes, and what each keeps and computes again."""

from __future__ import annotations

from weft.graph.layer_graph import LayerOptions, build_layer_graph
from weft.graph.pruning import Remat, backward_needs
from weft.model.adapters.weights import layer_widths
from weft.model.decoder import Decoder, attention_shape
from weft.model.finetune.layer_tensors import LayerPlan
from weft.model.finetune.parameters import TrainedWeights


def plan_layers(decoder: Decoder, trained: TrainedWeights, remat: Remat) -> tuple[LayerPlan, ...]:
    """One plan a layer, from the lowest; layers below the lowest trained one need nothing."""
    config = decoder.config
    options = LayerOptions(widths=layer_widths(config), qk_norm=config.qk_norm)
    lowest = min(target.layer for target in trained.targets)
    plans: list[LayerPlan] = []
    for index, weights in enumerate(decoder.weights.layers):
        targets = [target for target in trained.targets if target.layer == index]
        graph = build_layer_graph(options, targets)
        plans.append(
            LayerPlan(
                index=index,
                shape=attention_shape(config),
                weights=weights,
                bypasses=trained.bypasses(index),
                needs=backward_needs(graph, needs_input_grad=lowest < index, remat=remat),
                kernels=decoder.kernels,
                window=config.windows[index],
            )
        )
    return tuple(plans)
