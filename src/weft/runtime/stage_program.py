"""A cut plan as data: each stage's program, and the tensors that cross between stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor that crosses between stages: dtype and, for any number of samples, its shape.

    `sizes` holds (per sample, fixed) for each axis: an axis is per_sample * n + fixed long for n
    samples. `axis` is the one that holds the samples; None where there is none. `is_shared` says
    that the samples do not enter at all: the tensor comes from parameters and constants alone.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]
    axis: int | None
    needs_grad: bool
    is_shared: bool = False

    @property
    def per_sample(self) -> int:
        """Entries of the sample axis that belong to one sample."""
        return 0 if self.axis is None else self.sizes[self.axis][0]

    def shape(self, num_samples: int) -> tuple[int, ...]:
        """The shape for `num_samples` samples."""
        return tuple(slope * num_samples + fixed for slope, fixed in self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class CutEdge:
    """What one stage hands to another: `outputs[i]` of the source is `inputs[i]` of the target."""

    source: int
    target: int
    tensors: tuple[TensorSpec, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LeafInput:
    """An input of a stage that comes from the data: the leaf's index in `Capture.leaves`."""

    position: int
    leaf: int


@dataclass(frozen=True, kw_only=True)
class OwnModule:
    """A submodule of the user's that a stage calls as it is, by its path in the model.

    `parameters` and `buffers` hold (module, attribute, name in the model) of all inside it.
    """

    path: str
    module: nn.Module
    parameters: tuple[tuple[nn.Module, str, str], ...]
    buffers: tuple[tuple[nn.Module, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class StageProgram:
    """One stage as a function of (MicroBatch, sizes..., inputs..., weights..., own modules...).

    The weights are `parameters`, then `buffers`. `own` are the user's submodules that it calls;
    `num_nodes` is how many nodes of the exported program are left beside them.

    It returns its outputs, then for a stage with losses (total, weight) of each. A `weight` of
    None in `losses` stands for the number of samples, and the total for a mean.
    """

    index: int
    module: GraphModule
    sizes: tuple[tuple[int, int], ...]
    num_inputs: int
    leaves: tuple[LeafInput, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    num_outputs: int
    losses: tuple[bool, ...]
    """For each loss whether it is a pair."""
    counts_samples: bool
    """Whether the weight of means is counted here: once for all tasks."""
    has_dropout: bool
    own: tuple[OwnModule, ...] = ()
    num_nodes: int = 0
    tail: Tail | None = None

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """Parameters inside `own`, in the order in which LentWeights takes them."""
        return tuple(name for own in self.own for _, _, name in own.parameters)

    @property
    def own_buffers(self) -> tuple[str, ...]:
        """Buffers inside `own`, in the order in which LentWeights takes them."""
        return tuple(name for own in self.own for _, _, name in own.buffers)

    @property
    def is_own(self) -> bool:
        """Whether the user's modules hold all of its parameters: the cut is on their borders."""
        return bool(self.own) and not self.parameters

    @property
    def how_built(self) -> str:
        """In words: from which submodules, or from the exported graph."""
        if not self.own:
            return "cut from the exported graph"
        names = ", ".join(own.path or "the whole model" for own in self.own)
        between = f", with {self.num_nodes} nodes of the exported graph beside them"
        return f"the user's own modules {names}{between if self.num_nodes else ''}"

    @property
    def held_parameters(self) -> tuple[str, ...]:
        """The parameters of the stage and its tail."""
        more = () if self.tail is None else self.tail.program.held_parameters
        return tuple(dict.fromkeys((*self.parameters, *self.own_parameters, *more)))

    @property
    def held_buffers(self) -> tuple[str, ...]:
        """The buffers of the stage and its tail."""
        more = () if self.tail is None else self.tail.program.held_buffers
        return tuple(dict.fromkeys((*self.buffers, *self.own_buffers, *more)))


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What a stage computes once for the whole batch: all that relates samples to each other.

    `inputs[i]` of `program` is output `outputs[i]` of the stage, of all micro-batches together,
    described by `tensors[i]`; its data leaves come as in any program.
    """

    program: StageProgram
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class StageCut:
    """All stages of a plan and what crosses between them.

    `fixed_batches` are inputs whose batch torch.export could not keep open, and its size.
    """

    stages: tuple[StageProgram, ...]
    edges: Mapping[tuple[int, int], CutEdge]
    loss_stages: tuple[int, ...]
    fixed_batches: Mapping[str, int]
