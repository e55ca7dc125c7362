"""Cross-entropy of a window and its gradient at the hidden states; logits live for a moment only.

Shape legend: w labelled tokens of the window, h hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.model.finetune.primitives import rms_norm_backward, wide_dtype
from weft.model.kernels.interface import Kernels
from weft.model.weights import DecoderWeights

_CHUNK_ELEMENTS = 1 << 23
"""Logits held at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowLoss:
    """Of labelled tokens, of one sample or several."""

    losses: Tensor
    """[w] wide; not weighted."""
    d_hidden: Tensor | None
    """[w, h] gradient of the sum of losses times `scales`; None where there are none."""


def window_loss(
    hidden: Tensor,
    labels: Tensor,
    scales: Tensor | None,
    *,
    weights: DecoderWeights,
    kernels: Kernels,
    norm_eps: float,
) -> WindowLoss:
    """hidden [w, h] behind the last layer, the token that follows each [w] int64.

    `scales` [w] is what each loss counts for in what is differentiated; None: no gradient.
    """
    wide = wide_dtype(hidden.dtype)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    d_hidden = None if scales is None else torch.empty_like(hidden)
    rows = max(1, _CHUNK_ELEMENTS // weights.lm_head.out_features)
    for begin in range(0, hidden.shape[0], rows):
        span = slice(begin, begin + rows)
        normed = kernels.rms_norm(hidden[span], weights.final_norm, norm_eps)
        logits = weights.lm_head.forward(normed).to(wide)
        picked = labels[span, None]
        losses[span], probs = _softmax_and_loss(logits, picked)
        if d_hidden is None or scales is None:
            continue
        probs.scatter_add_(1, picked, probs.new_full((), -1.0).expand(picked.shape))
        # A row's scale is applied where rows are short.
        d_normed = weights.lm_head.grad_input(probs.to(hidden.dtype)).to(wide)
        d_normed *= scales[span, None].to(wide)
        d_hidden[span] = rms_norm_backward(d_normed, hidden[span], weights.final_norm, norm_eps)
    return WindowLoss(losses=losses, d_hidden=d_hidden)


def _softmax_and_loss(logits: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [w] and probabilities [w, V], which take the place of the logits."""
    label_logits = logits.gather(1, picked)[:, 0]
    top = logits.amax(1)
    probs = torch.softmax(logits, dim=1, out=logits)
    # The largest probability is 1 / sum(exp(logit - top)).
    return top - probs.amax(1).log() - label_logits, probs
