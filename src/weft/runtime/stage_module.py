"""A stage as an nn.Module: parameters under the model's own names, forward from its program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weft.runtime.micro_batch import MicroBatch
from weft.runtime.stage_program import StageProgram


class StageModule(nn.Module):
    """Runs one stage on one micro-batch; `named_parameters` are those of the model that it uses.

    `forward(call, inputs)` returns the stage's outputs, then the loss values (see StageProgram).
    The weights are looked up at every call, so whoever swaps them (FSDP2) is obeyed.
    """

    def __init__(
        self,
        program: StageProgram,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.program = program
        self._run = program.module.forward
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._weights: list[tuple[dict[str, Any], str]] = []
        for name in program.parameters:
            owner, leaf = self._owner(name)
            owner.register_parameter(leaf, parameters[name])
            self._weights.append((owner._parameters, leaf))
        for name in program.buffers:
            owner, leaf = self._owner(name)
            owner.register_buffer(leaf, buffers[name])
            self._weights.append((owner._buffers, leaf))

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The nested container that holds `name`, made where it is missing, and the last part."""
        *path, leaf = name.split(".")
        here: nn.Module = self
        for part in path:
            # Names of our own attributes may also be the model's.
            child = here._modules.get(part)
            if child is None:
                child = nn.Module()
                here._modules[part] = child
            here = child
        return here, leaf

    def forward(
        self,
        call: MicroBatch,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """One micro-batch of `call.num_samples` samples; `weights` replaces the module's own."""
        sizes = self._sizes.get(call.num_samples)
        if sizes is None:
            n = call.num_samples
            sizes = tuple(slope * n + fixed for slope, fixed in self.program.sizes)
            self._sizes[n] = sizes
        if weights is None:
            weights = [held[leaf] for held, leaf in self._weights]
        return self._run(call, *sizes, *inputs, *weights)
