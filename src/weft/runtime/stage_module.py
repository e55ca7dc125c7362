"""A stage as an nn.Module: parameters under the model's own names, forward from its program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weft.runtime.micro_batch import MicroBatch
from weft.runtime.own_modules import LentWeights
from weft.runtime.stage_program import StageProgram


class StageModule(nn.Module):
    """Runs one stage on one micro-batch; `named_parameters` are those of the model that it uses.

    `forward(call, inputs)` returns the stage's outputs, then the loss values (see StageProgram).
    The weights are looked up at every call, so whoever swaps them (FSDP2) is obeyed; except where
    the stage calls the user's own modules, which nobody shards.
    """

    def __init__(
        self,
        program: StageProgram,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.program = program
        self._own = tuple(own.module for own in program.own)
        self._lent = LentWeights(program.own) if program.own else None
        self._num_direct = len(program.parameters) + len(program.buffers)
        self._run = program.module.forward
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._weights: list[tuple[dict[str, Any], str]] = []
        for are_parameters, names in (
            (True, program.parameters),
            (False, program.buffers),
            (True, program.own_parameters),
            (False, program.own_buffers),
        ):
            for name in names:
                owner, leaf = self._owner(name)
                if are_parameters:
                    owner.register_parameter(leaf, parameters[name])
                else:
                    owner.register_buffer(leaf, buffers[name])
                held = owner._parameters if are_parameters else owner._buffers
                self._weights.append((held, leaf))
        # Whoever shards a stage must not find the whole tensors kept here.
        self._held = [held[leaf] for held, leaf in self._weights] if program.own else []

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
        if self._lent is None:
            if weights is None:
                weights = [held[leaf] for held, leaf in self._weights]
            return self._run(call, *sizes, *inputs, *weights)
        if weights is None:
            weights = self._held
        self._lent.lend(weights, self._num_direct, training=call.training)
        try:
            direct = weights[: self._num_direct]
            return self._run(call, *sizes, *inputs, *direct, *self._own)
        finally:
            self._lent.take_back()


def weights_in_order(
    program: StageProgram, parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]
) -> list[Tensor]:
    """A stage's weights in the order in which `StageModule.forward` takes them."""
    return [
        *(parameters[name] for name in program.parameters),
        *(buffers[name] for name in program.buffers),
        *(parameters[name] for name in program.own_parameters),
        *(buffers[name] for name in program.own_buffers),
    ]
