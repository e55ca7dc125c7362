"""Writes one stage of an exported program as a module of its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from weft.runtime import seeded_dropout
from weft.runtime.aten_nodes import (
    DROPOUTS,
    FEATURE_DROPOUTS,
    aten_name,
    functional_form,
    refuse_random,
    size_value,
)
from weft.runtime.block_program import move_node, region_on
from weft.runtime.micro_batch import split_linear

if TYPE_CHECKING:
    from weft.runtime.own_modules import OwnCall
    from weft.runtime.stage_cut import StageCutter


@dataclass(kw_only=True)
class Draft:
    """A stage while its needs are collected."""

    roots: list[Node] = field(default_factory=list)
    inside: set[Node] = field(default_factory=set)
    incoming: dict[Node, int] = field(default_factory=dict)
    """Nodes of other stages that it reads, and their stage."""
    placeholders: set[Node] = field(default_factory=set)

    def settles(self, node: Node) -> bool:
        """Whether nothing is left to find out about a node: it was seen, or is there anyway.

        Placeholders are noted; sizes come from the number of samples.
        """
        if node in self.inside or node in self.incoming or node in self.placeholders:
            return True
        if node.op == "placeholder":
            self.placeholders.add(node)
        return node.op == "placeholder" or size_value(node) is not None


class StageWriter:
    """Writes one stage's GraphModule."""

    def __init__(
        self, cutter: StageCutter, index: int, draft: Draft, calls: Sequence[OwnCall] = ()
    ) -> None:
        self.cutter, self.index, self.draft = cutter, index, draft
        self.calls = {call.first: (i, call) for i, call in enumerate(calls)}
        self.called = frozenset(node for call in calls for node in call.nodes)
        self.own: list[Node] = []
        self.num_nodes = 0
        self.graph = FxGraph()
        self.copied: dict[Node, Node] = {}
        self.sizes: list[tuple[int, int]] = []
        self.size_nodes: dict[tuple[int, int], Node] = {}
        self.inputs = cutter.inputs_of(draft)
        self.parameters: list[str] = []
        self.buffers: list[str] = []
        self.regions: dict[str, GraphModule] = {}
        self.has_dropout = False

    def write(self, outputs: Sequence[Node], losses: Sequence[Node]) -> GraphModule:
        """The stage as a module of its placeholders."""
        cutter, order = self.cutter, self.cutter.position
        inside = sorted(self.draft.inside - self.called, key=order.__getitem__)
        self.num_nodes = len(inside)
        self.key = self.graph.placeholder("call")
        for size in self._size_list(inside, losses):
            self._size_placeholder(size)
        for node in self.inputs:
            self.copied[node] = self.graph.placeholder(node.name)
        self._weights(inside)
        self.own = [self.graph.placeholder(f"own_{i}") for i in range(len(self.calls))]
        for node in sorted((*inside, *self.calls), key=order.__getitem__):
            if node in self.calls:
                self._call(*self.calls[node])
            else:
                self._copy(node)
        values = [self._value(node) for node in (*outputs, *losses)]
        self.graph.output(tuple(values))
        module = GraphModule(cutter.capture.program.graph_module, self.graph)
        for name, region in self.regions.items():
            setattr(module, name, region)
        return module

    def _size_list(self, inside: Sequence[Node], losses: Sequence[Node]) -> list[tuple[int, int]]:
        found: dict[tuple[int, int], None] = {}
        for node in inside:
            for read in self.cutter.reads(node):
                size = size_value(read)
                if size is not None:
                    found[self.cutter.size(size)] = None
            shaped = [*self.cutter.shape_operands(node)]
            shaped += [node] if self.cutter.broadcast_of(node) is not None else []
            for operand in shaped:
                for size in operand.meta["val"].shape:
                    found[self.cutter.size(size)] = None
        for node in losses:
            size = size_value(node)
            if size is not None:
                found[self.cutter.size(size)] = None
        return [size for size in found if size[0]]

    def _size_placeholder(self, size: tuple[int, int]) -> None:
        self.size_nodes[size] = self.graph.placeholder(f"size_{len(self.sizes)}")
        self.sizes.append(size)

    def _size(self, size: Any) -> Node | int:
        linear = self.cutter.size(size)
        return self.size_nodes[linear] if linear[0] else linear[1]

    def _value(self, node: Node) -> Any:
        size = size_value(node)
        return self.copied[node] if size is None else self._size(size)

    def _call(self, number: int, call: OwnCall) -> None:
        """Call the user's module in place of its nodes; as a method, so that hooks fire."""
        inputs = [self.copied[node] for node in call.inputs]
        positional, keywords = call.arguments.filled(inputs)
        module = self.own[number]
        result = self.graph.call_method("__call__", (module, *positional), keywords)
        for node, path in call.outputs.items():
            value = result
            for key in path:
                value = self.graph.call_function(operator.getitem, (value, key))
            self.copied[node] = value

    def _weights(self, inside: Sequence[Node]) -> None:
        """Placeholders of parameters, then of buffers; a tied parameter has one."""
        cutter = self.cutter
        by_name: dict[str, Node] = {}
        held = sorted(self.draft.placeholders - set(self.inputs), key=cutter.position.__getitem__)
        if self.called:  # What only own modules read they hold themselves.
            read = {n for node in inside for n in cutter.operands(node, self.index)}
            held = [node for node in held if node in read or node in self.draft.roots]
        for wanted, names in (("PARAMETER", self.parameters), ("", self.buffers)):
            for node in held:
                spec = cutter.specs[node]
                if (spec.kind.name == "PARAMETER") != (wanted == "PARAMETER"):
                    continue
                name = str(spec.target).removeprefix("module.")
                name = cutter.capture.canonical.get(name, name)
                if name not in by_name:
                    by_name[name] = self.graph.placeholder(node.name)
                    names.append(name)
                self.copied[node] = by_name[name]

    def _copy(self, node: Node) -> None:
        args, kwargs = self.cutter.arguments.get(node, (node.args, node.kwargs))
        name = aten_name(node)
        if node.op == "get_attr":
            self.copied[node] = self.graph.get_attr(str(node.target))
            region = getattr(self.cutter.capture.program.graph_module, str(node.target), None)
            if isinstance(region, GraphModule):
                refuse_random(region, self.cutter.where(node))
                self.regions[str(node.target)] = region_on(region, self.cutter.device)
            return
        whole = self.cutter.broadcast_of(node)
        if whole is not None:
            sizes = [self._size(size) for size in node.meta["val"].shape]
            self.copied[node] = self.graph.call_function(
                torch.ops.aten.expand.default, (self._value(whole), sizes)
            )
            return
        shape_only = self.cutter.shape_operands(node)
        stand_ins = {n: self._stand_in(n) for n in shape_only if n not in self.copied}

        def here(value: Node) -> Any:
            return stand_ins[value] if value in stand_ins else self._value(value)

        args, kwargs = pytree.tree_map_only(Node, here, (args, dict(kwargs)))
        seeded = self._seeded(node, name, args, kwargs)
        if seeded is not None:
            self.copied[node] = seeded
            return
        if name == "linear" and self.cutter.split_backward:
            bias = args[2] if len(args) > 2 else None
            copied = self.graph.call_function(split_linear, (args[0], args[1], bias, self.key))
            self.copied[node] = copied
            return
        target = functional_form(node) or node.target
        copied = self.graph.call_function(target, tuple(args), kwargs)  # type: ignore[arg-type]
        move_node(copied, self.cutter.device)
        self.copied[node] = copied

    def _stand_in(self, node: Node) -> Node:
        """A tensor of a node's shape and dtype that holds one element."""
        value: Tensor = node.meta["val"]
        one = self.graph.call_function(
            torch.ops.aten.empty.memory_format,
            ([],),
            {"dtype": value.dtype, "device": self.cutter.device},
        )
        sizes = [self._size(size) for size in value.shape]
        return self.graph.call_function(torch.ops.aten.expand.default, (one, sizes))

    def _seeded(self, node: Node, name: str, args: Any, kwargs: Any) -> Node | None:
        number = seeded_dropout.operator_number(node.name)
        if name in DROPOUTS or name in FEATURE_DROPOUTS:
            if not (args[1] > 0 and args[2]):
                return args[0]
            function = (
                seeded_dropout.dropout if name in DROPOUTS else seeded_dropout.feature_dropout
            )
            axis = self._sample_axis(node.args[0])
            self.has_dropout = True
            return self.graph.call_function(function, (args[0], args[1], self.key, number, axis))
        if name == "scaled_dot_product_attention":
            full = dict(
                zip(("q", "k", "v", "mask", "probability", "is_causal"), args, strict=False)
            )
            names = {"attn_mask": "mask", "dropout_p": "probability", "is_causal": "is_causal"}
            full |= {names[key]: kwargs[key] for key in kwargs if key in names}
            if not full.get("probability"):
                return None
            self.has_dropout = True
            return self.graph.call_function(
                seeded_dropout.attention,
                (
                    *(full[key] for key in ("q", "k", "v")),
                    full.get("mask"),
                    full["probability"],
                    full.get("is_causal", False),
                    kwargs.get("scale"),
                    kwargs.get("enable_gqa", False),
                    self.key,
                    number,
                    self._sample_axis(node.args[0]),
                ),
            )
        return None

    def _sample_axis(self, node: Any) -> int | None:
        sizes = [self.cutter.size(size) for size in node.meta["val"].shape]
        axes = [i for i, (slope, _) in enumerate(sizes) if slope]
        return axes[0] if len(axes) == 1 and sizes[axes[0]][1] == 0 else None
