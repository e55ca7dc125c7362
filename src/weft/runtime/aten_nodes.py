"""What the nodes of an exported program are: sizes, views, writes, random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from weft.base.errors import UnsupportedError

DROPOUTS = frozenset({"dropout", "dropout_"})
FEATURE_DROPOUTS = frozenset({"feature_dropout", "feature_dropout_"})
RANDOM = frozenset(
    {
        *("native_dropout", "alpha_dropout", "feature_alpha_dropout", "bernoulli", "bernoulli_"),
        *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "multinomial"),
        *("normal", "normal_", "uniform_", "exponential_", "randperm", "poisson"),
        *("rrelu", "rrelu_with_noise"),
    }
)
STATISTICS = frozenset({"batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"})


def aten_name(node: Node) -> str:
    """The operator that a node calls, without namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    return getattr(schema, "name", str(node.target)).split("::")[-1]


def size_value(node: Node) -> Any:
    """The symbolic or plain number that a node stands for; None for tensors and the like."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.SymInt | int) and node.op != "placeholder" else None


def draws_random(node: Node) -> bool:
    """Whether a node draws random numbers: also active dropout, alone or inside attention."""
    name = aten_name(node)
    if name in DROPOUTS | FEATURE_DROPOUTS:
        return bool(node.args[1] > 0 and node.args[2])  # type: ignore[operator]
    if name == "scaled_dot_product_attention":
        # aten.scaled_dot_product_attention(query, key, value, mask, dropout probability, ...)
        probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p")
        return bool(probability)
    return name in RANDOM


def refuse_random(region: GraphModule, where: str) -> None:
    """Refuse a region that draws random numbers; UnsupportedError names the operator."""
    for node in region.graph.nodes:
        if draws_random(node):
            raise UnsupportedError(
                f"{where} draws random numbers ({node.target}) inside a region of the program; "
                "move the dropout out of the no-grad, autocast or checkpoint block"
            )


def writes_first(node: Node) -> bool:
    """Whether an operator writes into its first argument."""
    schema = getattr(node.target, "_schema", None)
    first = schema.arguments[0].alias_info if schema and schema.arguments else None
    return bool(first and first.is_write)


def functional_form(node: Node) -> Any:
    """The operator that returns what this in-place one writes, or None where it writes nothing."""
    if not writes_first(node):
        return None
    packet = getattr(torch.ops.aten, aten_name(node).removesuffix("_"), None)
    overload = getattr(node.target, "_overloadname", "default")
    found = getattr(packet, overload, None) if packet is not None else None
    if found is None:
        raise UnsupportedError(
            f"node {node.name!r} writes in place ({node.target}) and has no form that does not; "
            "use the out-of-place operator"
        )
    return found


def without_writes(nodes: Sequence[Node]) -> dict[Node, tuple[Any, Any]]:
    """Arguments of every node once in-place operators return new tensors instead.

    Later readers of a written tensor read the new one. A tensor that is written through a view, or
    has views that are read later, cannot be treated so: UnsupportedError.
    """
    current: dict[Node, Node] = {}
    found: dict[Node, tuple[Any, Any]] = {}
    position = {node: i for i, node in enumerate(nodes)}
    for node in nodes:

        def now(value: Node) -> Node:
            while value in current:
                value = current[value]
            return value

        mapped = pytree.tree_map_only(Node, now, (node.args, dict(node.kwargs)))
        found[node] = (mapped[0], mapped[1])
        if node.op == "call_function" and writes_first(node) and "_assert" not in str(node.target):
            written = mapped[0][0]
            if _is_view_of_other(written) or any(
                _is_view_of_other(user) and any(position[u] > position[node] for u in user.users)
                for user in written.users
                if position[user] < position[node]
            ):
                raise UnsupportedError(
                    f"node {node.name!r} ({node.target}) writes into a tensor that is a view or "
                    "has views; use the out-of-place operator"
                )
            current[written] = node
    return found


def _is_view_of_other(node: Any) -> bool:
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments or not schema.returns:
        return False
    first, result = schema.arguments[0].alias_info, schema.returns[0].alias_info
    return bool(first and result and not first.is_write)
