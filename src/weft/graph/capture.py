"""Capture: any exportable nn.Module becomes a Graph, on meta or fake tensors, at no memory.

`torch.export` runs the module and its loss once, symbolically, with a dynamic batch; every aten
operator is recorded (`weft.graph.capture_walk`, the only other file of this room that uses torch),
priced (`weft.graph.aten`, which also states the saved-for-backward rule) and lowered to operators
per sample (`weft.graph.lowering`). Views, casts to the same dtype and inactive dropout cost nothing
and are no operators.

Operator ids are `module path:ordinal` (ordinal among the operators that the module itself runs); a
module that is called again has `@k` after the part of its path that repeats. They depend on the
model's code alone, so they are equal in every process.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from weft.base.errors import ConfigError
from weft.graph.capture_walk import CaptureError, ProgramWalker
from weft.graph.graph import Graph
from weft.graph.lowering import Recording, lower

Loss = Callable[..., "Tensor | tuple[Tensor, Tensor | int | float] | Mapping[str, Tensor]"]
"""`loss(output, *targets)`: one scalar, a pair (sum, weight) whose quotient is the loss, or one
scalar per task by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputLeaf:
    """One tensor of the example inputs and targets: its placeholder, and its batch axis if any."""

    name: str
    batch_axis: int | None
    is_target: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LossNodes:
    """The program's nodes that hold a task's loss; `total / weight` where the loss is a pair.

    `total` and `weight` are empty for a loss that is one scalar.
    """

    task: str
    mean: str
    total: str = ""
    weight: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capture:
    """A graph with the exported program that it came from, for whoever runs parts of it.

    `nodes` maps each operator's id to the names of the program's nodes that make it up; `batch` is
    the number of samples in the example. `leaves` are the tensors of (args, kwargs, targets) in
    pytree order, `losses` one entry a task. `canonical` maps every path of a parameter to its id.
    """

    graph: Graph
    program: ExportedProgram
    nodes: Mapping[str, tuple[str, ...]]
    batch: int
    leaves: tuple[InputLeaf, ...] = ()
    losses: tuple[LossNodes, ...] = ()
    canonical: Mapping[str, str] = field(default_factory=dict)


def capture(
    module: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    loss: Loss | None = None,
    targets: tuple[Any, ...] = (),
    batch_axes: int | Sequence[int | None] = 0,
    training: bool = True,
    name: str = "",
) -> Graph:
    """The computation graph of one training step of `module`, all figures per sample.

    `example_inputs` are positional (tuple) or keyword (mapping) arguments with a batch of at least
    2; shapes matter, values do not, and a module on the meta device needs no memory. `batch_axes`
    is the batch axis of every input and target tensor, or one entry for each, None where a tensor
    has none. `loss(output, *targets)` returns a scalar, a pair (sum, weight), or a mapping of task
    name to scalar for several losses. Without it the module's own loss is used (its scalar output,
    or a field named `loss`), else the mean of its floating outputs (of `logits` where there is such
    a field). With `training=False` the module runs in eval mode and nothing is saved or
    differentiated.

    Raises CaptureError with torch.export's reason and the module's path when export fails,
    GraphError when trainable parameters reach no loss, ConfigError for a bad example batch.
    """
    return trace(
        module,
        example_inputs,
        loss=loss,
        targets=targets,
        batch_axes=batch_axes,
        training=training,
        name=name,
    ).graph


def trace(
    module: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    loss: Loss | None = None,
    targets: tuple[Any, ...] = (),
    batch_axes: int | Sequence[int | None] = 0,
    training: bool = True,
    name: str = "",
) -> Capture:
    """As `capture`, and keeps the exported program beside the graph."""
    if isinstance(example_inputs, Tensor):
        raise ConfigError(
            "example_inputs is a tensor; pass a tuple of positional arguments or a mapping of "
            "keyword arguments, as in capture(module, (x,))"
        )
    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    wrapper = _Trained(module, loss if training else None, training)
    inputs = (args, kwargs, tuple(targets) if training else ())
    if any(p.is_meta for p in module.parameters()):
        inputs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
    batch, shapes = _batch(inputs, batch_axes)
    with _on_one_device(module):
        with _mode(module, training):
            program = _export(wrapper, inputs, shapes)
        walker = ProgramWalker(program, module, training)
        outputs = walker.run()
    losses = {}
    tasks = wrapper.loss.tasks() if training else ()
    if training:
        losses = dict(zip(tasks, outputs[: len(tasks)], strict=True))
        # The sum and weight of a pair come last; they are inside the loss, no outputs of their own.
        outputs = outputs[len(tasks) : -2 if wrapper.loss.is_pair() else None]
    lowered = lower(
        Recording(
            name=name or type(module).__name__,
            recorder=walker.recorder,
            outputs=tuple(outputs),
            losses=losses,
            parameters=walker.parameters,
            batch=batch,
            dtype=walker.main_dtype,
        )
    )
    nodes = {
        op_id: tuple(dict.fromkeys(walker.node_of_step[i] for i in steps))
        for op_id, steps in lowered.steps_of_op.items()
    }
    return Capture(
        graph=lowered.graph,
        program=program,
        nodes=nodes,
        batch=batch,
        leaves=_leaves(program, inputs, shapes),
        losses=_loss_nodes(program, tasks, training and wrapper.loss.is_pair()),
        canonical=walker.canonical,
    )


def _leaves(program: ExportedProgram, inputs: Any, shapes: Any) -> tuple[InputLeaf, ...]:
    """The placeholders of the tensors among `inputs`, in pytree order."""
    specs = program.graph_signature.input_specs
    names = [spec.arg.name for spec in specs if spec.kind.name == "USER_INPUT"]
    flat = pytree.tree_leaves(inputs)
    axes = pytree.tree_leaves(shapes, is_leaf=_is_axes)
    num_targets = len(pytree.tree_leaves(inputs[2]))
    return tuple(
        InputLeaf(
            name=name,
            batch_axis=next(iter(axis)) if axis else None,
            is_target=position >= len(flat) - num_targets,
        )
        for position, (name, leaf, axis) in enumerate(zip(names, flat, axes, strict=True))
        if isinstance(leaf, Tensor)
    )


def _is_axes(entry: Any) -> bool:
    """Whether this is the `dynamic_shapes` entry of one tensor, not a container of entries."""
    return entry is None or (
        isinstance(entry, dict) and bool(entry) and all(isinstance(key, int) for key in entry)
    )


def _loss_nodes(
    program: ExportedProgram, tasks: Sequence[str], is_pair: bool
) -> tuple[LossNodes, ...]:
    specs = program.graph_signature.output_specs
    names = [spec.arg.name for spec in specs if spec.kind.name == "USER_OUTPUT"]
    if is_pair:
        return (LossNodes(task=tasks[0], mean=names[0], total=names[-2], weight=names[-1]),)
    return tuple(LossNodes(task=t, mean=n) for t, n in zip(tasks, names, strict=False))


class _Trained(nn.Module):
    """A module followed by its loss; returns (losses..., floating outputs...)."""

    def __init__(self, module: nn.Module, loss: Loss | None, training: bool) -> None:
        super().__init__()
        self.module = module
        self.loss = _LossPart(loss)
        self.with_loss = training

    def forward(self, args: Any, kwargs: Any, targets: Any) -> tuple[Tensor, ...]:
        output = self.module(*args, **kwargs)
        tensors = [
            leaf
            for leaf in pytree.tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if not self.with_loss:
            return tuple(tensors)
        losses = self.loss(output, targets)
        return (*losses.means.values(), *tensors, *losses.pair)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Losses:
    """Scalars by task, and the sum and weight that the only one is made of, if it is."""

    means: dict[str, Tensor]
    pair: tuple[Tensor, ...] = ()


class _LossPart(nn.Module):
    def __init__(self, function: Loss | None) -> None:
        super().__init__()
        self.function = function
        # Closures: torch.export puts back every attribute that forward changes.
        seen: list[str] = []
        pairs: list[bool] = []
        self.note = seen.extend
        self.note_pair = pairs.append
        self.tasks = lambda: tuple(dict.fromkeys(seen))
        self.is_pair = lambda: any(pairs)

    def forward(self, output: Any, targets: Any) -> _Losses:
        found = _default_loss(output) if self.function is None else self.function(output, *targets)
        pair: tuple[Tensor, ...] = ()
        if isinstance(found, tuple | list):
            pair = _pair(found)
            self.note_pair(True)
            found = pair[0] / pair[1]
        losses = dict(found) if isinstance(found, Mapping) else {"": found}
        for task, value in losses.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(
                    f"loss {task!r} is {shape}, not a scalar; reduce it, for example with .mean(), "
                    "or return a pair (sum, weight)"
                )
        self.note(losses)
        return _Losses(means=losses, pair=pair)


def _pair(found: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Sum and weight as scalars of the sum's dtype."""
    if len(found) != 2 or not isinstance(found[0], Tensor) or found[0].numel() != 1:
        raise ConfigError(
            f"the loss returned a {type(found).__name__} of {len(found)}; a pair is (sum, weight): "
            "a scalar tensor, and a number or scalar tensor"
        )
    total, weight = found
    if not isinstance(weight, Tensor):
        weight = total.new_full((), weight)
    return total, weight.to(total.dtype).reshape(())


def _default_loss(output: Any) -> Tensor:
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits = getattr(output, "logits", None)
    leaves = [logits] if isinstance(logits, Tensor) else pytree.tree_leaves(output)
    floating = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if not floating:
        raise ConfigError("the module returns no floating tensor to make a loss of; pass `loss`")
    if len(floating) == 1 and floating[0].dim() == 0:
        return floating[0]
    return torch.stack([x.float().mean() for x in floating]).sum()


@contextmanager
def _on_one_device(module: nn.Module) -> Iterator[None]:
    """A module of which a part is on meta is there as a whole, inside; tied tensors stay tied."""
    if not any(p.is_meta for p in module.parameters()):
        yield
        return
    moved: dict[int, Tensor] = {}
    taken: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in moved:
                    empty = tensor.detach().to("meta")
                    moved[id(tensor)] = (
                        nn.Parameter(empty, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else empty
                    )
                taken.append((cast("dict[str, Any]", held), name, tensor))
    for held, name, tensor in taken:
        held[name] = moved[id(tensor)]
    try:
        yield
    finally:
        for held, name, tensor in taken:
            held[name] = tensor


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, flag in before:
            m.training = flag


def _batch(inputs: Any, batch_axes: int | Sequence[int | None]) -> tuple[int, Any]:
    """Samples in the example, and the `dynamic_shapes` that torch.export takes for `inputs`."""
    leaves, spec = pytree.tree_flatten(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    axes = [batch_axes] * len(tensors) if isinstance(batch_axes, int) else list(batch_axes)
    if len(axes) != len(tensors):
        raise ConfigError(
            f"batch_axes has {len(axes)} entries for {len(tensors)} input and target tensors; "
            "give one for each, or one int for all"
        )
    batch = 0
    shapes: list[Any] = []
    remaining = iter(axes)
    for leaf in leaves:
        axis = next(remaining) if isinstance(leaf, Tensor) else None
        if axis is None or leaf.dim() == 0:
            shapes.append(None)
            continue
        if not -leaf.dim() <= axis < leaf.dim():
            raise ConfigError(
                f"batch axis {axis} is out of range for an input of shape {tuple(leaf.shape)}"
            )
        batch = batch or leaf.shape[axis]
        if leaf.shape[axis] < 2:
            raise ConfigError(
                f"an example input of shape {tuple(leaf.shape)} has batch {leaf.shape[axis]} on "
                f"axis {axis}; use at least 2, so that export keeps the batch dynamic"
            )
        shapes.append({axis % leaf.dim(): Dim.AUTO})
    if not batch:
        raise ConfigError("no example input has a batch axis; set batch_axes")
    return batch, pytree.tree_unflatten(shapes, spec)


def _export(wrapper: _Trained, inputs: Any, shapes: Any) -> ExportedProgram:
    # torch prints the whole half-made graph when it fails; the reason alone helps.
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            program = torch.export.export(wrapper, inputs, dynamic_shapes=shapes, strict=False)
        sys.stderr.write(printed.getvalue())
        return program
    except ConfigError:
        raise
    except Exception as error:
        where = _failing_module(wrapper.module, error)
        reason = str(error).strip().split("\n\n")[0]
        raise CaptureError(
            f"torch.export cannot export module {where}: {type(error).__name__}: {reason} "
            "(remove the data-dependent step, or capture the parts around it)"
        ) from error


def _failing_module(module: nn.Module, error: BaseException) -> str:
    """Path and class of the innermost module whose forward is on the error's traceback."""
    paths = {id(m): path for path, m in module.named_modules()}
    found = (repr("") if not paths else f"'' ({type(module).__name__})").replace("''", "'.'")
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            found = f"{paths[id(owner)] or '.'!r} ({type(owner).__name__})"
        trace = trace.tb_next
    return found
