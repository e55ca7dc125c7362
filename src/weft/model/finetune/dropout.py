"""Dropout masks that are a function of where an element stands, and of nothing else.

The mask of (job seed, step, index within the step, layer, module, position, feature) is the same in
forward, in recomputation, in backward, whatever the windows, and after a restart. A row and a
column are mixed well once (SplitMix64: Steele, Lea, Flood, OOPSLA 2014); their sum is mixed per
element with the cheaper 32-bit finalizer of Wellons' hash-prospector ("lowbias32").

Shape legend: T tokens, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.graph.adapter_spec import Module

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MODULE_NUMBERS = {module: number for number, module in enumerate(Module)}


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutKey:
    """What the masks of one sample in one optimizer step depend on besides the element."""

    seed: int
    """The job's."""
    step: int
    index: int
    """The sample's place within the step."""
    probability: float
    """Of an element being dropped, in [0, 1)."""


def dropout_scale(
    key: DropoutKey,
    *,
    layer: int,
    module: Module,
    positions: Tensor,
    num_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """What to multiply a module's input [T, F] with: 0 where dropped, else 1 / (1 - probability).

    `positions` [T] are those of the tokens within their sample.
    """
    run = 0
    for number in (key.seed, key.step, key.index, layer, _MODULE_NUMBERS[module]):
        run = _mix_int(run ^ _mix_int(number & _MASK_64))
    columns = torch.arange(num_features, device=positions.device)
    rows_T = _mix(positions.long() * _signed(_GOLDEN) + _signed(run))
    columns_F = _mix(columns * _signed(_GOLDEN) + _signed(_mix_int(run)))
    # The narrowing keeps the low halves, which are as well mixed as the high ones.
    bits_TF = rows_T.to(torch.int32)[:, None] + columns_F.to(torch.int32)
    _scramble_(bits_TF)
    # Signed numbers from -2**31: the dropped share lies at the bottom.
    threshold = round(key.probability * 2**32) - 2**31
    keep_TF = bits_TF >= threshold
    return keep_TF.to(dtype).mul_(1.0 / (1.0 - key.probability))


def _scramble_(x: Tensor) -> None:
    """Mix int32 in place; shifts must bring zeros from the left, so the sign is masked away."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = (x + _GOLDEN) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
