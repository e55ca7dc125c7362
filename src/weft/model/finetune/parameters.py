"""The trained weights of one job: masters, working copies and gradients, each one flat tensor.

Masters are float32 under bfloat16 and float16 bases, as PEFT keeps them, and of the model's dtype
otherwise; layers compute with working copies in the model's dtype, which are the masters themselves
where the dtypes agree. Optimizers see flat tensors only.

Shape legend: P all trained numbers of a job.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.graph.adapter_spec import AdapterSpec, BypassTarget, Module
from weft.model.adapters.weights import weight_shapes
from weft.model.finetune.bypass import TrainedBypass
from weft.model.finetune.primitives import wide_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSlot:
    """Where one weight lies within the flat tensors."""

    target: BypassTarget
    name: str
    """`A`, `B`, `l`, `down`, `down_bias`, `up` or `up_bias`."""
    shape: tuple[int, ...]
    begin: int

    @property
    def key(self) -> str:
        """A name that is unique within the adapter, such as `3.q_proj.A`."""
        return f"{self.target.layer}.{self.target.module}.{self.name}"

    def view(self, flat: Tensor) -> Tensor:
        """This weight within a flat tensor [P]."""
        size = torch.Size(self.shape)
        return flat[self.begin : self.begin + size.numel()].view(size)


def initial_weight(slot: ParameterSlot, seed: int) -> Tensor:
    """A weight before the first step, in float32: a function of (seed, layer, module, name).

    As PEFT's: A uniform as kaiming's with a = sqrt(5), B zero, (IA)³ ones. A bottleneck begins as
    nothing: its `down` like A, the rest zero.
    """
    if slot.name == "l":
        return torch.ones(slot.shape)
    if slot.name not in ("A", "down"):
        return torch.zeros(slot.shape)
    generator = torch.Generator()
    # 32 bits, since torch's CPU generator looks at no more of a seed.
    generator.manual_seed(zlib.crc32(f"{seed}:{slot.key}".encode()))
    bound = slot.shape[1] ** -0.5
    return torch.empty(slot.shape).uniform_(-bound, bound, generator=generator)


class TrainedWeights:
    """All trained weights of a job."""

    def __init__(
        self,
        spec: AdapterSpec,
        targets: Sequence[BypassTarget],
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        """`dtype` is the model's."""
        self.spec = spec
        self.targets = tuple(targets)
        self.slots = _lay_out(targets)
        num = sum(torch.Size(slot.shape).numel() for slot in self.slots)
        wide = wide_dtype(dtype)
        self.master = torch.empty(num, dtype=wide, device=device)
        self.grads = torch.zeros(num, dtype=wide, device=device)
        same = dtype is wide
        self.working = self.master if same else torch.empty(num, dtype=dtype, device=device)
        for slot in self.slots:
            slot.view(self.master).copy_(initial_weight(slot, seed))
        self.refresh()

    @property
    def size_bytes(self) -> int:
        """Bytes of masters, working copies and gradients."""
        flats = {id(flat): flat for flat in (self.master, self.working, self.grads)}
        return sum(flat.numel() * flat.element_size() for flat in flats.values())

    def refresh(self) -> None:
        """Bring the working copies up to the masters."""
        if self.working is not self.master:
            self.working.copy_(self.master)

    @property
    def is_finite(self) -> bool:
        """Whether all working copies are numbers: a master may be too large for their dtype."""
        return bool(torch.isfinite(self.working).all())

    def bypasses(self, layer: int, flat: Tensor | None = None) -> dict[Module, TrainedBypass]:
        """The bypasses of one layer; their tensors are views that stay good.

        Weights are views of `flat` [P], by default of the working copies.
        """
        flat = self.working if flat is None else flat
        found: dict[Module, TrainedBypass] = {}
        for target in self.targets:
            if target.layer == layer:
                slots = [slot for slot in self.slots if slot.target is target]
                found[target.module] = TrainedBypass(
                    target=target,
                    weights={slot.name: slot.view(flat) for slot in slots},
                    grads={slot.name: slot.view(self.grads) for slot in slots},
                    activation=self.spec.activation,
                )
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Masters by `ParameterSlot.key`: views."""
        return {slot.key: slot.view(self.master) for slot in self.slots}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take masters by their keys; the caller has checked names and shapes."""
        for slot in self.slots:
            slot.view(self.master).copy_(tensors[slot.key])
        self.refresh()


def _lay_out(targets: Sequence[BypassTarget]) -> tuple[ParameterSlot, ...]:
    slots: list[ParameterSlot] = []
    begin = 0
    for target in targets:
        for name, shape in weight_shapes(target).items():
            slots.append(ParameterSlot(target=target, name=name, shape=shape, begin=begin))
            begin += torch.Size(shape).numel()
    return tuple(slots)
