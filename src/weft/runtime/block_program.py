"""Cuts one block out of an exported program, so that it runs by itself at any batch size."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from weft.base.errors import UnsupportedError
from weft.graph.capture import Capture
from weft.graph.graph import Op


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockInput:
    """One tensor that a block reads: its shape at the example batch, and what it stands for.

    `scales` are the axes that grow with the batch. `is_weight` marks parameters and buffers, which
    are made once; `needs_grad` asks for a gradient.
    """

    shape: tuple[int, ...]
    scales: tuple[int, ...]
    dtype: torch.dtype
    is_weight: bool
    needs_grad: bool

    def make(self, num_samples: int, example_batch: int, device: torch.device) -> Tensor:
        """A tensor of this description for `num_samples` samples; integers are 0, a valid index."""
        shape = [
            size * num_samples // example_batch if axis in self.scales else size
            for axis, size in enumerate(self.shape)
        ]
        if self.dtype.is_floating_point:
            tensor = torch.randn(shape, device=device, dtype=torch.float32).mul_(0.02)
            return tensor.to(self.dtype).requires_grad_(self.needs_grad)
        return torch.zeros(shape, device=device, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockProgram:
    """A block as a module of its inputs; it returns the tensors that other blocks read."""

    module: GraphModule
    inputs: tuple[BlockInput, ...]
    example_batch: int
    writes_inputs: bool


def cut_block(capture: Capture, block: Op, device: torch.device) -> BlockProgram:
    """The part of `capture.program` that computes `block`, ready to run on `device`."""
    return _Cutter(capture, block, device).cut()


def check_dynamic_batch(capture: Capture, batch_sizes: Sequence[int]) -> None:
    """Raise UnsupportedError when the program fixes its batch and other sizes are asked for."""
    if tuple(batch_sizes) == (capture.batch,):
        return
    for node, spec in _placeholders(capture):
        value = node.meta.get("val")
        if spec.kind.name != "USER_INPUT" or not isinstance(value, Tensor) or not value.dim():
            continue
        if all(isinstance(size, int) for size in value.shape):
            raise UnsupportedError(
                f"the model fixes the shape of input {node.name!r} at {tuple(value.shape)}, so it "
                f"runs at batch {capture.batch} only; profile with --batch-sizes {capture.batch}"
            )


def _placeholders(capture: Capture) -> Iterator[tuple[Node, Any]]:
    nodes = [n for n in capture.program.graph.nodes if n.op == "placeholder"]
    return zip(nodes, capture.program.graph_signature.input_specs, strict=True)


class _Cutter:
    def __init__(self, capture: Capture, block: Op, device: torch.device) -> None:
        self.capture = capture
        self.device = device
        self.members = set(block.members or (block.id,))
        inside = {name for op_id in self.members for name in capture.nodes[op_id]}
        self.inside = inside
        self.op_of_node = {name: op for op, names in capture.nodes.items() for name in names}
        self.specs = {node.name: spec for node, spec in _placeholders(capture)}
        self.graph = FxGraph()
        self.copied: dict[Node, Node] = {}
        self.inputs: list[BlockInput] = []
        self.writes_inputs = False
        self.regions: dict[str, GraphModule] = {}
        edges = capture.graph.edges
        self.grad_sources = {e.source for e in edges if e.needs_grad and e.target in self.members}

    def cut(self) -> BlockProgram:
        nodes = [n for n in self.capture.program.graph.nodes if n.name in self.inside]
        # Placeholders must come first in a graph, so inputs are found before anything is copied.
        for source in self._sources(nodes):
            self.copied[source] = self._placeholder(source)
        for node in nodes:
            self._copy(node)
        outputs = [self.copied[n] for n in nodes if self._leaves(n)]
        self.graph.output(tuple(outputs))
        module = GraphModule(self.capture.program.graph_module, self.graph)
        for name, region in self.regions.items():
            setattr(module, name, region)
        return BlockProgram(
            module=module,
            inputs=tuple(self.inputs),
            example_batch=self.capture.batch,
            writes_inputs=self.writes_inputs,
        )

    def _is_source(self, node: Node) -> bool:
        if node.op == "placeholder":
            return True
        if node.name in self.op_of_node and node.name not in self.inside:
            return not isinstance(node.meta.get("val"), tuple | list)
        return (
            node.target is operator.getitem
            and isinstance(node.args[0], Node)
            and node.args[0].name in self.op_of_node
            and node.args[0].name not in self.inside
        )

    def _sources(self, nodes: Sequence[Node]) -> list[Node]:
        """Where the block's inputs enter, in program order."""
        found: set[Node] = set()
        seen: set[Node] = set(nodes)
        stack = [arg for node in nodes for arg in node.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if self._is_source(node):
                found.add(node)
            else:
                stack.extend(node.all_input_nodes)
        return [n for n in self.capture.program.graph.nodes if n in found]

    def _placeholder(self, node: Node) -> Node:
        value = node.meta["val"]
        spec = self.specs.get(node.name)
        kind = spec.kind.name if spec is not None else ""
        producer = self.op_of_node.get(node.name) or self._producer_of_item(node)
        if kind == "PARAMETER":
            name = str(spec.target).removeprefix("module.") if spec is not None else ""
            by_id = self.capture.graph.parameter_by_id
            needs_grad = name not in by_id or by_id[name].trainable
        else:
            needs_grad = producer in self.grad_sources
        self.inputs.append(_describe(value, kind not in ("", "USER_INPUT"), needs_grad))
        return self.graph.placeholder(node.name)

    def _producer_of_item(self, node: Node) -> str | None:
        source = node.args[0] if node.args else None
        return self.op_of_node.get(source.name) if isinstance(source, Node) else None

    def _copy(self, node: Node) -> Node:
        """Copy a node after what it reads; iterative, since view chains may be long."""
        stack = [node]
        while stack:
            here = stack[-1]
            missing = [a for a in here.all_input_nodes if a not in self.copied]
            if here in self.copied or not missing:
                stack.pop()
                if here not in self.copied:
                    self.copied[here] = self._copy_one(here)
            else:
                stack.extend(missing)
        return self.copied[node]

    def _copy_one(self, node: Node) -> Node:
        copied = self.graph.node_copy(node, self.copied.__getitem__)
        move_node(copied, self.device)
        if node.op == "get_attr":
            self._copy_region(str(node.target))
        schema = getattr(node.target, "_schema", None)
        first = schema.arguments[0].alias_info if schema and schema.arguments else None
        self.writes_inputs = self.writes_inputs or bool(first and first.is_write)
        return copied

    def _copy_region(self, name: str) -> None:
        """Keep the sub-graph that a node refers to."""
        region = getattr(self.capture.program.graph_module, name, None)
        if not isinstance(region, GraphModule):
            return
        self.regions[name] = region_on(region, self.device)

    def _leaves(self, node: Node) -> bool:
        users = [u for u in node.users if "_assert" not in str(u.target)]
        return not users or any(u not in self.copied for u in users)


def move_node(node: Node, device: torch.device) -> None:
    """Captured on meta tensors, a program makes its tables there; here they are real."""
    node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, dict(node.kwargs))
    node.args = tuple(pytree.tree_map_only(torch.device, lambda _: device, node.args))


def region_on(region: GraphModule, device: torch.device) -> GraphModule:
    """A copy of a sub-graph (a no-grad region) that makes its tables on the device."""
    region = copy.deepcopy(region)
    for node in list(region.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            region.graph.erase_node(node)
        else:
            move_node(node, device)
    region.recompile()
    return region


def _describe(value: Tensor, is_weight: bool, needs_grad: bool) -> BlockInput:
    scales = tuple(i for i, size in enumerate(value.shape) if not isinstance(size, int))
    shape = tuple(int(s) if isinstance(s, int) else int(s.node.hint) for s in value.shape)
    return BlockInput(
        shape=shape,
        scales=scales,
        dtype=value.dtype,
        is_weight=is_weight,
        needs_grad=needs_grad and value.dtype.is_floating_point,
    )


def run_block(program: BlockProgram, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Forward of a block; returns the floating tensors that leave it."""
    if program.writes_inputs:
        tensors = [t.clone() if t.requires_grad else t for t in tensors]
    leaves = pytree.tree_leaves(program.module(*tensors))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
