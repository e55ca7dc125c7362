"""One iteration of several prompts, each through an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from runtime.harness import HandMade, Row
from weft.model.adapters.weights import AdapterWeights
from weft.model.forward_step import BypassGroup, BypassStep
from weft.runtime.device_context import DeviceContext
from weft.runtime.step_builder import build_step

PROMPTS = ([5, 9, 2, 44], [7], [8, 8, 31, 60, 2, 17, 90], [3, 4], [11, 12, 13])


def run_mixed(
    context: DeviceContext,
    adapters: Sequence[AdapterWeights | None],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    **kwargs: Any,
) -> list[Tensor]:
    """Logits of each prompt's tokens, all in one iteration, prompt i through adapters[i]."""
    made = HandMade(context, max_num_seqs=len(adapters))
    batch = made.batch([Row(slot=i, tokens=prompts[i]) for i in range(len(adapters))])
    starts = batch.row_starts.tolist()
    groups = tuple(
        BypassGroup(rows=slice(starts[i], starts[i + 1]), adapter=adapter)
        for i, adapter in enumerate(adapters)
        if adapter is not None
    )
    step = build_step(batch, context, torch.zeros(8, dtype=torch.int32))
    step = replace(step, bypass=BypassStep(groups=groups) if groups else None)
    decoder = context.decoder
    hidden = decoder.forward(decoder.embed(step.token_ids), step, context.kv, **kwargs)
    logits = decoder.logits(hidden)
    return [logits[a:b] for a, b in pairwise(starts)]
