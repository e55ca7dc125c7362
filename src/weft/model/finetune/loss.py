"""Cross-entropy of a window and its gradient at the hidden states; logits live for a moment only.

Shape legend: w labelled tokens of the window, h hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.model.finetune.primitives import rms_norm_backward, wide_dtype
from weft.model.kernels.cpu_backward import cross_entropy
from weft.model.kernels.interface import Kernels
from weft.model.weights import DecoderWeights

_CHUNK_BYTES = 1 << 24
"""Of logits held at once."""


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
    rows = max(1, _CHUNK_BYTES // (weights.lm_head.out_features * hidden.element_size()))
    for begin in range(0, hidden.shape[0], rows):
        span = slice(begin, begin + rows)
        normed = kernels.rms_norm(hidden[span], weights.final_norm, norm_eps)
        logits = weights.lm_head.forward(normed)
        losses[span], d_logits = _cross_entropy(logits, labels[span], scales is not None)
        if d_hidden is None or scales is None:
            continue
        # A row's scale is applied where rows are short.
        d_normed = weights.lm_head.grad_input(d_logits).to(wide)
        d_normed *= scales[span, None].to(wide)
        d_hidden[span] = rms_norm_backward(d_normed, hidden[span], weights.final_norm, norm_eps)
    return WindowLoss(losses=losses, d_hidden=d_hidden)


def _cross_entropy(logits: Tensor, labels: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses [w], and their gradient at the logits [w, V], which are used up."""
    losses = cross_entropy(logits, labels, wants_gradient=wants_gradient)
    if losses is not None:
        return losses, logits
    picked = labels[:, None]
    losses, probs = _softmax_and_loss(logits.to(wide_dtype(logits.dtype)), picked)
    if wants_gradient:
        probs.scatter_add_(1, picked, probs.new_full((), -1.0).expand(picked.shape))
    return losses, probs.to(logits.dtype)


def _softmax_and_loss(logits: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [w] and probabilities [w, V], which take the place of the logits."""
    label_logits = logits.gather(1, picked)[:, 0]
    top = logits.amax(1)
    probs = torch.softmax(logits, dim=1, out=logits)
    # The largest probability is 1 / sum(exp(logit - top)).
    return top - probs.amax(1).log() - label_logits, probs
