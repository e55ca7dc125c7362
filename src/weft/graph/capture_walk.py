"""Walk an exported program: every aten operator recorded, with the node that it came from.

Operators of inlined regions (no-grad, autocast, checkpointed functions) are recorded as if they
stood in the program; views, casts to the same dtype and inactive dropout are no operators.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from weft.base.errors import UnsupportedError
from weft.graph.aten import SHAPE_ONLY, VIEWS, Operand
from weft.graph.graph import Parameter
from weft.graph.lowering import LOSS_PATH
from weft.graph.recorder import Origin, Recorder, Value


class CaptureError(UnsupportedError):
    """A module that cannot be captured; the message holds torch.export's reason and the path."""


class ProgramWalker:
    """Replays an exported program node by node into a Recorder."""

    def __init__(self, program: ExportedProgram, module: nn.Module, training: bool) -> None:
        self.program = program
        self.recorder = Recorder()
        self.training = training
        self.node_of_step: list[str] = []
        self._node = ""
        self._attended: set[Node] = set()
        self._copies: dict[tuple[Any, ...], bool] = {}
        self.canonical: dict[str, str] = {}
        self.parameters: dict[str, Parameter] = {}
        first: dict[int, str] = {}
        elements: dict[str, int] = {}
        for path, tensor in module.named_parameters(remove_duplicate=False):
            param_id = first.setdefault(id(tensor), path)
            self.canonical[path] = param_id
            dtype = _dtype_name(tensor.dtype)
            elements[dtype] = elements.get(dtype, 0) + tensor.numel()
            self.parameters[param_id] = Parameter(
                id=param_id,
                num_elements=tensor.numel(),
                dtype=dtype,
                trainable=training and tensor.requires_grad,
            )
        self.main_dtype = max(elements, key=lambda d: elements[d]) if elements else "float32"

    def run(self) -> list[Value]:
        """Record every node; returns the values of the program's outputs."""
        specs = self.program.graph_signature.input_specs
        placeholders = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        inputs = [
            self._placeholder(node, spec.kind.name, spec.target or "")
            for node, spec in zip(placeholders, specs, strict=True)
        ]
        results = self._run_graph(self.program.graph_module, inputs, grad_enabled=self.training)
        # Buffers that the module updates (BatchNorm's statistics) come before the user's outputs.
        kinds = [spec.kind.name for spec in self.program.graph_signature.output_specs]
        wanted = [r for r, kind in zip(results, kinds, strict=True) if kind == "USER_OUTPUT"]
        return [value for value in wanted if isinstance(value, Value)]

    def _placeholder(self, node: Node, kind: str, target: str) -> Any:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor):
            return tensor
        operand = _operand(tensor, node)
        if kind == "PARAMETER":
            param_id = self.canonical[target.removeprefix("module.")]
            trainable = self.parameters[param_id].trainable
            operand = _operand(tensor, node, needs_grad=trainable)
            return self.recorder.new_value(Origin.WEIGHT, operand, param_ids=(param_id,))
        origin = Origin.INPUT if kind == "USER_INPUT" else Origin.CONSTANT
        return self.recorder.new_value(origin, operand)

    def _run_graph(
        self, graph_module: GraphModule, inputs: Sequence[Any], *, grad_enabled: bool
    ) -> list[Any]:
        env: dict[Node, Any] = {}
        remaining = iter(inputs)
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(remaining)
            elif node.op == "get_attr":
                env[node] = self._attribute(graph_module, node)
            elif node.op == "call_function":
                if graph_module is self.program.graph_module:
                    self._node = node.name
                env[node] = self._call(node, env, grad_enabled)
            elif node.op == "output":
                return [env[a] if isinstance(a, Node) else a for a in node.args[0]]
        return []

    def _attribute(self, graph_module: GraphModule, node: Node) -> Any:
        owner: Any = graph_module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        if isinstance(owner, Tensor):
            return self.recorder.new_value(Origin.CONSTANT, _operand(owner, node))
        return owner

    def _call(self, node: Node, env: dict[Node, Any], grad_enabled: bool) -> Any:
        arguments = pytree.tree_map_only(Node, env.__getitem__, (node.args, node.kwargs))
        if node.target is operator.getitem:
            return arguments[0][0][arguments[0][1]]
        leaves = pytree.tree_leaves(arguments)
        parts = [leaf for leaf in leaves if isinstance(leaf, GraphModule)]
        if parts:
            return self._region(node, parts, arguments[0], grad_enabled)
        outputs = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        reads = [self.recorder.current(leaf) for leaf in leaves if isinstance(leaf, Value)]
        if not outputs:
            return node.meta.get("val")
        values = self._operator(node, arguments[0], reads, outputs, grad_enabled)
        if isinstance(node.meta["val"], Tensor):
            return values[0]
        spec = pytree.tree_structure(node.meta["val"])
        remaining = iter(values)
        return pytree.tree_unflatten(
            [
                next(remaining) if isinstance(v, Tensor) else v
                for v in pytree.tree_leaves(node.meta["val"])
            ],
            spec,
        )

    def _region(
        self, node: Node, parts: list[GraphModule], args: tuple[Any, ...], grad_enabled: bool
    ) -> Any:
        """Inline a sub-graph (a no-grad or autocast region, a checkpointed function)."""
        target = str(node.target)
        if len(parts) != 1:
            raise CaptureError(
                f"module {_module_path(node) or '.'!r} branches on data ({target}), so its cost "
                "depends on values; capture one branch, or replace the control flow"
            )
        if "set_grad_enabled" in target:
            grad_enabled = grad_enabled and bool(args[0])
        position = next(i for i, a in enumerate(args) if isinstance(a, GraphModule))
        return tuple(self._run_graph(parts[0], args[position + 1 :], grad_enabled=grad_enabled))

    def _operator(
        self,
        node: Node,
        args: tuple[Any, ...],
        reads: list[Value],
        outputs: list[Tensor],
        grad_enabled: bool,
    ) -> Sequence[Value]:
        target = node.target
        name = getattr(getattr(target, "_schema", None), "name", str(target)).split("::")[-1]
        operands = [_operand(t, node) for t in outputs]
        if name in SHAPE_ONLY:
            return [self.recorder.new_value(Origin.CONSTANT, o) for o in operands]
        if name == "broadcast_tensors":
            return [self.recorder.view(v, o) for v, o in zip(reads, operands, strict=True)]
        if name == "scaled_dot_product_attention":
            self._attended.add(node)
        if reads and self._is_view(name, node, args, outputs):
            if node.args[0] in self._attended:
                self._attended.add(node)
            detached = name in ("detach", "detach_") or not grad_enabled
            return [self.recorder.view(reads[0], o, detached=detached) for o in operands]
        schema = getattr(target, "_schema", None)
        first = schema.arguments[0].alias_info if schema and schema.arguments else None
        values = self.recorder.call(
            name.removesuffix("_"),
            _module_path(node),
            reads,
            operands,
            grad_enabled=grad_enabled,
            in_place=bool(first and first.is_write),
            equation=args[0] if name == "einsum" else "",
        )
        num_new = len(self.recorder.steps) - len(self.node_of_step)
        self.node_of_step.extend([self._node] * num_new)
        return values

    def _is_view(self, name: str, node: Node, args: tuple[Any, ...], outputs: list[Tensor]) -> bool:
        if name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout"):
            return not (args[1] > 0 and args[2])
        source = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
        if name not in VIEWS or not isinstance(source, Tensor):
            return False
        if name in ("to", "type_as"):
            return source.dtype == outputs[0].dtype
        if node.args[0] in self._attended:
            # Fused kernels lay their output out by rows (B, S, H, E), so merging the heads again
            # copies nothing; a meta tensor shows the strides of the unfused formula instead.
            return True
        if name == "contiguous":
            return source.is_contiguous()
        if name in ("reshape", "flatten", "_unsafe_view", "view"):
            return not self._reshape_copies(source, outputs[0])
        return True

    def _reshape_copies(self, source: Tensor, output: Tensor) -> bool:
        key = (_sizes(source.shape), _sizes(source.stride()), _sizes(output.shape))
        if key not in self._copies:
            # torch itself knows when a reshape can be a view; a meta tensor asks it for free.
            empty = torch.empty_strided(key[0], key[1], device="meta")
            try:
                empty.view(key[2])
                self._copies[key] = False
            except RuntimeError:
                self._copies[key] = True
        return self._copies[key]


def _sizes(shape: Sequence[Any]) -> tuple[int, ...]:
    """Concrete sizes at the example batch."""
    return tuple(int(s) if isinstance(s, int) else int(cast(Any, s).node.hint) for s in shape)


def _operand(tensor: Tensor, node: Node, *, needs_grad: bool = False) -> Operand:
    try:
        shape = _sizes(tensor.shape)
    except TypeError:
        raise CaptureError(
            f"module {_module_path(node) or '.'!r} makes a tensor whose size depends on data "
            f"({node.target}: {tuple(tensor.shape)}), so it has no cost per sample; pad to a "
            "fixed size, or capture the parts around it"
        ) from None
    return Operand(
        shape=shape,
        itemsize=tensor.dtype.itemsize,
        floating=tensor.is_floating_point() or tensor.is_complex(),
        needs_grad=needs_grad,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _module_path(node: Node) -> str:
    """Path of the module that ran this node, `@k` marking where its k-th further call begins."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    label, before, calls = "", "", "0"
    for key, (path, _) in stack.items():
        if not path.startswith(before):
            continue
        label += path[len(before) :]
        before = path
        call = key.rpartition("@")[2] if "@" in key else "0"
        if call != calls and call != "0":
            label += f"@{call}"
        calls = call
    if label == "module" or not label:
        return ""
    if label.startswith("loss"):
        return LOSS_PATH
    return label.removeprefix("module.")
