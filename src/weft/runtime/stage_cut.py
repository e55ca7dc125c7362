"""Cuts an exported program into the stages of a plan: what each computes, reads and hands on.

Every aten node belongs to the stage of its operator (`Capture.nodes`). Nodes of no operator (views,
constants, sizes) are copied into every stage that needs them, so that what crosses between two
stages is what the graph's edges count: the outputs of operators. Sizes that depend on the batch are
computed from the number of samples at hand, so no stage needs a tensor for its shape alone.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from weft.base.errors import IntegrityError, UnsupportedError
from weft.graph.aten import SHAPE_ONLY
from weft.graph.capture import Capture
from weft.plan.train_plan import PlanError, TrainPlan
from weft.runtime.aten_nodes import RANDOM, STATISTICS, aten_name, size_value, without_writes
from weft.runtime.own_modules import Arguments, Call, calls_of, own_calls, seen_calls
from weft.runtime.stage_program import (
    CutEdge,
    LeafInput,
    StageCut,
    StageProgram,
    Tail,
    TensorSpec,
)
from weft.runtime.stage_writer import Draft, StageWriter


def cut_stages(
    capture: Capture,
    plan: TrainPlan,
    device: torch.device,
    *,
    allow_mixing: bool = False,
    split_backward: bool = False,
    edge_dtype: torch.dtype | None = None,
    whole_batch: bool = False,
    module: nn.Module | None = None,
) -> StageCut:
    """The programs of the plan's stages, ready to run on `device`.

    With `allow_mixing` samples of a micro-batch may meet in one tensor (a contrastive loss). With
    `split_backward` linear layers can leave their weights' gradients for later. Floating tensors
    between stages have `edge_dtype` where it is given. With `whole_batch` what relates samples to
    each other, and the loss, becomes the tail of its stage. With `module`, the captured one, stages
    call its submodules where these lie whole in a stage (`weft.runtime.own_modules`).
    Raises UnsupportedError for operators that a pipeline cannot run as one process would
    (BatchNorm in training, unseeded random numbers), PlanError where the plan lacks an edge.
    """
    cutter = StageCutter(capture, plan, device, allow_mixing)
    cutter.split_backward, cutter.edge_dtype = split_backward, edge_dtype
    cutter.whole_batch = whole_batch
    if module is not None and not split_backward:
        # A split backward replaces linear layers, which the user's modules would not know of.
        cutter.module, cutter.calls = module, calls_of(cutter.nodes)
        cutter.seen_calls = seen_calls(module, capture)
    return cutter.cut()


class StageCutter:
    """Decides which stage computes what; see `cut_stages`."""

    def __init__(
        self, capture: Capture, plan: TrainPlan, device: torch.device, allow_mixing: bool
    ) -> None:
        self.capture, self.plan, self.device = capture, plan, device
        self.allow_mixing = allow_mixing
        self.split_backward = False
        self.whole_batch = False
        self.module: nn.Module | None = None
        self.calls: list[Call] = []
        self.seen_calls: dict[str, list[Arguments | None]] = {}
        self.tails: dict[int, Draft] = {}
        self.edge_dtype: torch.dtype | None = None
        self.nodes = list(capture.program.graph.nodes)
        self.by_name = {node.name: node for node in self.nodes}
        self.position = {node: i for i, node in enumerate(self.nodes)}
        signature = capture.program.graph_signature
        holders = [n for n in self.nodes if n.op == "placeholder"]
        self.specs = dict(zip(holders, signature.input_specs, strict=True))
        self.leaf_of = {leaf.name: i for i, leaf in enumerate(capture.leaves)}
        self.arguments = without_writes(self.nodes)
        self.ops_of_node: dict[Node, list[str]] = {}
        for op_id, names in capture.nodes.items():
            for name in names:
                self.ops_of_node.setdefault(self.by_name[name], []).append(op_id)
        self.owner: dict[Node, int] = {}
        self._assign_owners()
        self._check_nodes()
        self.drafts = [Draft() for _ in plan.stages]
        self.symbols = self._symbols()
        self.from_data = self._from_data()
        if not allow_mixing:
            self._check_mixing()

    def cut(self) -> StageCut:
        """Collect what each stage needs from the last to the first, then write the programs."""
        losses = self._loss_roots()
        for index in reversed(self.plan.topological_order):
            draft = self.drafts[index]
            if self.whole_batch and index in losses:
                self.tails[index] = self._collect_tail(index, losses[index])
                draft.roots.extend(self.tails[index].incoming)
            draft.roots.sort(key=self.position.__getitem__)
            own_losses = () if index in self.tails else losses.get(index, ())
            self._collect(index, draft, [*draft.roots, *own_losses])
        outputs = [list(dict.fromkeys(draft.roots)) for draft in self.drafts]
        stages = tuple(
            self._with_tail(i, draft, outputs[i], losses[i])
            if i in self.tails
            else self._program(i, draft, outputs[i], losses.get(i, ()))
            for i, draft in enumerate(self.drafts)
        )
        edges = {
            (source, target): self._edge(source, target, outputs)
            for target, draft in enumerate(self.drafts)
            for source in sorted(set(draft.incoming.values()))
        }
        return StageCut(
            stages=stages,
            edges=edges,
            loss_stages=tuple(sorted(losses)),
            fixed_batches=self._fixed_batches(),
        )

    def submodule(self, path: str) -> nn.Module:
        """The user's module of this path."""
        if self.module is None:
            raise IntegrityError(f"module {path!r} is asked for, but no module was given")
        return self.module.get_submodule(path)

    # Who owns a node

    def _assign_owners(self) -> None:
        for node, ops in self.ops_of_node.items():
            stages = {self.plan.stage_of[op] for op in ops}
            if len(stages) == 1:
                self.owner[node] = stages.pop()
            elif any(self._is_parameter(arg) for arg in node.all_input_nodes):
                raise UnsupportedError(
                    f"operators {ops[0]!r} and {ops[-1]!r} lie in one region of the program "
                    f"({node.target}) but in stages {sorted(stages)}; keep them in one stage"
                )
        for node in self.nodes:
            if node.target is operator.getitem and node.args[0] in self.owner:
                self.owner[node] = self.owner[node.args[0]]  # type: ignore[index]

    def _is_parameter(self, node: Node) -> bool:
        return node in self.specs and self.specs[node].kind.name == "PARAMETER"

    def _check_nodes(self) -> None:
        for node in self.nodes:
            if node.op != "call_function":
                continue
            name = aten_name(node)
            where = self.where(node)
            if name in STATISTICS and self._uses_batch_statistics(node, name):
                raise UnsupportedError(
                    f"{where} is BatchNorm in training mode, whose statistics depend on how the "
                    "batch is cut; use GroupNorm or LayerNorm, or put it in eval mode"
                )
            if name in RANDOM:
                raise UnsupportedError(
                    f"{where} draws random numbers ({node.target}) that would depend on the plan; "
                    "dropout, feature dropout and dropout of attention are seeded, nothing else is"
                )
            if name == "embedding" and len(node.args) > 4 and node.args[4]:
                raise UnsupportedError(
                    f"{where} makes sparse gradients; build the embedding with sparse=False"
                )
        for spec in self.capture.program.graph_signature.output_specs:
            if spec.kind.name == "BUFFER_MUTATION":
                raise UnsupportedError(
                    f"forward changes buffer {str(spec.target).removeprefix('module.')!r}, which "
                    "every micro-batch would change again; keep it out of the module"
                )

    def _check_mixing(self) -> None:
        """Refuse operators whose result relates samples to each other."""
        for node in self.owner:
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                continue
            if sum(not isinstance(size, int) for size in value.shape) > 1:
                raise UnsupportedError(
                    f"{self.where(node)} relates the samples of a micro-batch to each other "
                    f"(shape {tuple(map(str, value.shape))}), so the result depends on how the "
                    "batch is cut; declare loss_scope='micro_batch' or 'global'"
                )

    @staticmethod
    def _uses_batch_statistics(node: Node, name: str) -> bool:
        # aten.batch_norm(input, weight, bias, mean, var, training, ...)
        return bool(node.args[5]) if name in ("batch_norm", "cudnn_batch_norm") else True

    def where(self, node: Node) -> str:
        """A node as errors name it: its operator where it belongs to one."""
        ops = self.ops_of_node.get(node)
        return f"operator {ops[0]!r}" if ops else f"node {node.name!r}"

    # What a stage needs

    def _loss_roots(self) -> dict[int, list[Node]]:
        found: dict[int, list[Node]] = {}
        for loss in self.capture.losses:
            names = [loss.total, loss.weight] if loss.total else [loss.mean]
            nodes = [self.by_name[name] for name in names]
            found.setdefault(self._stage_of_value(self.by_name[loss.mean]), []).extend(nodes)
        if not found:
            raise UnsupportedError(
                f"graph {self.capture.graph.name!r} was captured without a loss; capture it with "
                "training=True"
            )
        return found

    def _stage_of_value(self, node: Node) -> int:
        """The stage that computes a node, or the last of those that its operands come from."""
        order = {stage: i for i, stage in enumerate(self.plan.topological_order)}
        stack, found, seen = [node], set(), set()
        while stack:
            here = stack.pop()
            if here in seen:
                continue
            seen.add(here)
            if here in self.owner:
                found.add(self.owner[here])
            else:
                stack.extend(self.reads(here))
        return max(found, key=order.__getitem__)

    def reads(self, node: Node) -> list[Node]:
        """The nodes among the arguments; of an expanded tensor the one that it is made of."""
        whole = self.broadcast_of(node)
        if whole is not None:
            return [whole]
        args, kwargs = self.arguments.get(node, (node.args, node.kwargs))
        return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Node)]

    def broadcast_of(self, node: Node) -> Node | None:
        """The tensor that a node is an expansion of: one result of broadcast_tensors."""
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, Node) or aten_name(source) != "broadcast_tensors":
            return None
        parts = self.arguments[source][0][0]
        return parts[node.args[1]]

    def _collect(self, index: int, draft: Draft, roots: Sequence[Node]) -> None:
        stack = list(roots)
        while stack:
            node = stack.pop()
            if draft.settles(node):
                continue
            owner = self.owner.get(node, index)
            if owner != index and not isinstance(node.meta.get("val"), tuple | list):
                draft.incoming[node] = owner
                self._hand_on(owner, index, node)
                continue
            draft.inside.add(node)
            stack.extend(self.operands(node, index))

    def _collect_tail(self, index: int, losses: Sequence[Node]) -> Draft:
        """What a loss stage computes for the whole batch; `incoming` is what it needs of it."""
        late = self._late_nodes()
        elsewhere = [n for n in late if self.owner.get(n, index) != index]
        if elsewhere:
            raise UnsupportedError(
                f"{self.where(elsewhere[0])} in stage {self.owner[elsewhere[0]]} relates samples "
                f"to each other, but the loss is in stage {index}; with loss_scope='global' keep "
                "everything from there on in the stage of the loss"
            )
        draft = Draft()
        stack = list(losses)
        while stack:
            node = stack.pop()
            if draft.settles(node):
                continue
            owner = self.owner.get(node)
            is_made_before = owner is not None and node not in late
            if (
                is_made_before
                and (owner != index or node in self.from_data)
                and not isinstance(node.meta.get("val"), tuple | list)
            ):
                draft.incoming[node] = index
                continue
            draft.inside.add(node)
            stack.extend(self.operands(node, index))
        return draft

    def _late_nodes(self) -> set[Node]:
        """Nodes that relate samples to each other, belong to a loss, or follow from such."""
        losses = {op.id for op in self.capture.graph.ops if op.is_loss}
        found: set[Node] = set()
        for node in self.nodes:
            if node.op != "call_function" or size_value(node) is not None:
                continue
            value = node.meta.get("val")
            sizes = value.shape if isinstance(value, Tensor) else ()
            if (
                sum(self.size(size)[0] > 0 for size in sizes) > 1
                or not losses.isdisjoint(self.ops_of_node.get(node, ()))
                or not found.isdisjoint(self.reads(node))
            ):
                found.add(node)
        return found

    def _with_tail(
        self, index: int, draft: Draft, outputs: Sequence[Node], losses: Sequence[Node]
    ) -> StageProgram:
        tail = self.tails[index]
        inputs = self.inputs_of(tail)
        gathered = [node for node in inputs if node in tail.incoming]
        return replace(
            self._program(index, draft, outputs, ()),
            tail=Tail(
                program=self._program(index, tail, (), losses),
                inputs=tuple(inputs.index(node) for node in gathered),
                outputs=tuple(outputs.index(node) for node in gathered),
                tensors=tuple(self._gathered_spec(node) for node in gathered),
            ),
        )

    def _gathered_spec(self, node: Node) -> TensorSpec:
        value: Tensor = node.meta["val"]
        sizes = tuple(self.size(size) for size in value.shape)
        axes = [i for i, (slope, _) in enumerate(sizes) if slope]
        is_shared = not axes and node not in self.from_data
        if not is_shared and (len(axes) != 1 or sizes[axes[0]] != (1, 0)):
            raise UnsupportedError(
                f"{self.where(node)} has no axis with one entry a sample, so the whole batch of "
                "it cannot be gathered; loss_scope='micro_batch' does not need to"
            )
        return TensorSpec(
            name=node.name,
            dtype=value.dtype,
            sizes=sizes,
            axis=None if is_shared else axes[0],
            needs_grad=value.dtype.is_floating_point,
            is_shared=is_shared,
        )

    def _hand_on(self, source: int, target: int, node: Node) -> None:
        edge = self.plan.edge_by_pair.get((source, target))
        if edge is None or edge.is_order_only:
            raise PlanError(
                f"stage {target} reads {node.name!r} of {self.where(node)} in stage {source}, but "
                "the plan has no edge with bytes between them; plan again from this capture"
            )
        self.drafts[source].roots.append(node)

    def operands(self, node: Node, index: int) -> list[Node]:
        """What must be there for a node; not the operands that it reads for their shape alone."""
        shape_only = self.shape_operands(node)
        return [
            n for n in self.reads(node) if n not in shape_only or self.owner.get(n, index) == index
        ]

    @staticmethod
    def shape_operands(node: Node) -> frozenset[Node]:
        """The operand whose shape alone a node reads; empty for nodes that read values."""
        name = aten_name(node)
        position = 0 if name in SHAPE_ONLY else 1
        if name not in SHAPE_ONLY and name not in ("expand_as", "view_as", "reshape_as", "type_as"):
            return frozenset()
        operand = node.args[position] if len(node.args) > position else None
        return frozenset({operand}) if isinstance(operand, Node) else frozenset()

    # Writing the programs

    def _program(
        self, index: int, draft: Draft, outputs: Sequence[Node], losses: Sequence[Node]
    ) -> StageProgram:
        calls = own_calls(self, index, draft, [*outputs, *losses]) if self.calls else []
        writer = StageWriter(self, index, draft, calls)
        module = writer.write(outputs, losses)
        num_pairs = [bool(loss.total) for loss in self.capture.losses]
        return StageProgram(
            index=index,
            module=module,
            sizes=tuple(writer.sizes),
            num_inputs=len(writer.inputs),
            leaves=tuple(
                LeafInput(position=i, leaf=self.leaf_of[node.name])
                for i, node in enumerate(writer.inputs)
                if node.op == "placeholder"
            ),
            parameters=tuple(writer.parameters),
            buffers=tuple(writer.buffers),
            num_outputs=len(outputs),
            losses=(True,) if num_pairs == [True] and losses else (False,) * len(losses),
            counts_samples=self.by_name[self.capture.losses[0].mean] in losses,
            has_dropout=writer.has_dropout,
            own=tuple(call.module for call in calls),
            num_nodes=writer.num_nodes,
        )

    def inputs_of(self, draft: Draft) -> list[Node]:
        """A stage's inputs in order: data leaves, then tensors of other stages."""
        data = [n for n in draft.placeholders if self.specs[n].kind.name == "USER_INPUT"]
        incoming = sorted(draft.incoming, key=self.position.__getitem__)
        return [*sorted(data, key=self.position.__getitem__), *incoming]

    def _edge(self, source: int, target: int, outputs: Sequence[Sequence[Node]]) -> CutEdge:
        draft = self.drafts[target]
        inputs = self.inputs_of(draft)
        crossing = [n for n in inputs if draft.incoming.get(n) == source]
        return CutEdge(
            source=source,
            target=target,
            tensors=tuple(self._spec(node, target) for node in crossing),
            outputs=tuple(outputs[source].index(node) for node in crossing),
            inputs=tuple(inputs.index(node) for node in crossing),
        )

    def _spec(self, node: Node, target: int) -> TensorSpec:
        value: Tensor = node.meta["val"]
        sizes = tuple(self.size(size) for size in value.shape)
        axes = [i for i, (slope, _) in enumerate(sizes) if slope]
        ops = set(self.ops_of_node.get(node) or self.ops_of_node[node.args[0]])  # type: ignore[index]
        inside = set(self.plan.stages[target].ops)
        floating = value.dtype.is_floating_point
        needs_grad = floating and any(
            edge.needs_grad
            for edge in self.capture.graph.edges
            if edge.source in ops and edge.target in inside
        )
        edge = self.plan.edge_by_pair[self.owner[node], target]
        return TensorSpec(
            name=node.name,
            dtype=self.edge_dtype or value.dtype if floating else value.dtype,
            sizes=sizes,
            axis=axes[0] if len(axes) == 1 and sizes[axes[0]][1] == 0 else None,
            needs_grad=needs_grad and edge.backward_bytes_per_sample > 0,
            is_shared=not axes and node not in self.from_data,
        )

    def _from_data(self) -> set[Node]:
        """Nodes whose values depend on samples."""
        found: set[Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                leaf = self.leaf_of.get(node.name)
                if leaf is not None and self.capture.leaves[leaf].batch_axis is not None:
                    found.add(node)
            elif size_value(node) is None and any(
                read in found for read in self.reads(node) if read not in self.shape_operands(node)
            ):
                found.add(node)
        return found

    # Sizes

    def _symbols(self) -> dict[Any, int]:
        """Entries per sample of each symbol that stands for a batch axis."""
        found: dict[Any, int] = {}
        for leaf in self.capture.leaves:
            value = self.by_name[leaf.name].meta["val"]
            if leaf.batch_axis is None or isinstance(value.shape[leaf.batch_axis], int):
                continue
            size = value.shape[leaf.batch_axis].node
            for symbol in size.expr.free_symbols:
                found[symbol] = max(1, int(size.hint) // self.capture.batch)
        return found

    def _fixed_batches(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for leaf in self.capture.leaves:
            if leaf.batch_axis is not None:
                size = self.size(self.by_name[leaf.name].meta["val"].shape[leaf.batch_axis])
                if size[0] == 0:
                    found[leaf.name] = size[1]
        return found

    def size(self, size: Any) -> tuple[int, int]:
        """(per sample, fixed) of a size of the program."""
        if isinstance(size, int):
            return (0, size)
        expr = size.node.expr
        unknown = expr.free_symbols - self.symbols.keys()
        if unknown:
            raise UnsupportedError(
                f"size {expr} depends on {sorted(map(str, unknown))}, which is not the batch; "
                "only the batch may vary"
            )

        def at(num_samples: int) -> int:
            return int(expr.subs({s: n * num_samples for s, n in self.symbols.items()}))

        one, two, seven = at(1), at(2), at(7)
        slope, fixed = two - one, 2 * one - two
        if seven != 7 * slope + fixed:
            raise UnsupportedError(
                f"size {expr} is not a fixed number of entries per sample; it cannot be cut"
            )
        return (slope, fixed)


def check_edges(cut: StageCut, plan: TrainPlan) -> None:
    """Raise IntegrityError where a plan's edge with bytes carries no tensor of the program."""
    for edge in plan.edges:
        pair = (edge.source, edge.target)
        if not edge.is_order_only and pair not in cut.edges:
            raise IntegrityError(f"edge {pair[0]} -> {pair[1]} of the plan carries no tensor")
