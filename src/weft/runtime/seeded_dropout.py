"""Dropout whose mask is a function of (seed, step, sample, operator, element) and nothing else.

So a sample meets the same mask whatever plan trains it, in forward and in recomputation, on every
device. Source of the mixing: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from weft.runtime.micro_batch import MicroBatch

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_BITS = 24
"""Bits of each draw: as many as a float32 holds exactly."""


def operator_number(name: str) -> int:
    """A number for an operator, from its name in the exported program; equal in every process."""
    return zlib.crc32(name.encode())


def keep_mask(
    key: MicroBatch, operator: int, probability: float, num_elements: int, device: torch.device
) -> Tensor:
    """Which elements stay: bool of shape (num_samples, num_elements of one sample)."""
    run = _mix_int(_mix_int(key.seed & _MASK_64) ^ _mix_int((key.step << 32) ^ operator))
    samples_N = torch.arange(
        key.first_sample + 1, key.first_sample + 1 + key.num_samples, device=device
    )
    base_N = _mix(samples_N * _signed(_GOLDEN) ^ _signed(run))
    elements_E = torch.arange(num_elements, device=device) * _signed(_GOLDEN)
    bits_NE = (_mix(base_N[:, None] + elements_E) >> (64 - _BITS)) & ((1 << _BITS) - 1)
    return bits_NE >= round(probability * (1 << _BITS))


def dropout(
    x: Tensor, probability: float, key: MicroBatch, operator: int, axis: int | None
) -> Tensor:
    """`x` with elements zeroed at random, the rest scaled by 1 / (1 - probability).

    `axis` holds the samples, `size / num_samples` consecutive entries each; None where all samples
    share one mask (the tensor has no sample axis).
    """
    if not key.training or probability == 0.0:
        return x
    return x * _scaled_mask(x, probability, key, operator, axis, x.shape)


def feature_dropout(
    x: Tensor, probability: float, key: MicroBatch, operator: int, axis: int | None
) -> Tensor:
    """As `dropout`, whole channels at once: all axes after the second share a mask."""
    if not key.training or probability == 0.0:
        return x
    shape = torch.Size([*x.shape[:2], *([1] * (x.dim() - 2))])
    return x * _scaled_mask(x, probability, key, operator, axis, shape)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    probability: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key: MicroBatch,
    operator: int,
    axis: int | None,
) -> Tensor:
    """Scaled dot-product attention with this dropout on its weights, in the unfused form."""
    if not key.training or probability == 0.0:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf"))
            if mask.dtype == torch.bool
            else (scores + mask)
        )
    return dropout(scores.softmax(-1), probability, key, operator, axis) @ v


def _scaled_mask(
    x: Tensor,
    probability: float,
    key: MicroBatch,
    operator: int,
    axis: int | None,
    shape: torch.Size,
) -> Tensor:
    if axis is None:
        # Nothing of the samples enters: every micro-batch must meet the mask of "sample 0".
        one = MicroBatch(seed=key.seed, step=key.step, first_sample=0, num_samples=1)
        mask = keep_mask(one, operator, probability, shape.numel(), x.device).view(shape)
    else:
        per_sample = shape[axis] // key.num_samples
        rest = [*shape[:axis], per_sample, *shape[axis + 1 :]]
        mask = keep_mask(key, operator, probability, math.prod(rest), x.device)
        mask = mask.view(key.num_samples, *rest).movedim(0, axis).reshape(shape)
    keep = 1.0 - probability
    return mask.to(x.dtype).div_(keep) if keep > 0 else torch.zeros_like(mask, dtype=x.dtype)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_int(value: int) -> int:
    value = (value + _GOLDEN) & _MASK_64
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK_64
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK_64
    return value ^ (value >> 31)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose shifts to the right are arithmetic in torch."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_FIRST)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_SECOND)
    return x ^ ((x >> 31) & ((1 << 33) - 1))
