"""The user's own submodules inside a stage: found in the exported program, checked, then called.

A submodule whose operators all lie in one stage need not run from the exported graph: the stage can
call the user's nn.Module object, so that forward hooks fire and torch.compile is obeyed. What it is
called with cannot be read off the graph. So the model runs on meta tensors, which shows how each
submodule is called; the tensors that its nodes read from outside take the places of those that it
was given; and that is proved: the module and its nodes are both run on meta tensors, and must give
the dispatcher the same operators with the same arguments. A module that does not, draws random
numbers or writes in place is looked at part by part instead.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from weft.base.errors import UnsupportedError
from weft.graph.capture import Capture
from weft.runtime.aten_nodes import draws_random, size_value, writes_first
from weft.runtime.stage_program import OwnModule

if TYPE_CHECKING:
    from weft.runtime.stage_cut import StageCutter
    from weft.runtime.stage_writer import Draft

_log = logging.getLogger("weft.runtime")
_ROOT = "module"
"""The user's module within the exported program."""
_MAX_ORDERS = 24
"""Orders of a call's inputs that are tried."""
_MAX_VERSIONS = 4
"""Lists of weights that are remembered: two versions, and what evaluation runs with."""
_Lent = tuple[dict[str, Any], str, dict[str, Any]]
"""A module's attributes, the name of one, and its value."""


class NotTheSameError(UnsupportedError):
    """A submodule that cannot be called in place of its nodes; the message says why."""


@dataclass(kw_only=True)
class Call:
    """One call of a submodule: its nodes in the exported program, and the calls made inside."""

    path: str
    number: int = 0
    """How many calls of this module came before."""
    nodes: list[Node] = field(default_factory=list)
    inside: list[Call] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """Stands for the n-th different tensor among the arguments of a call."""

    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """How a module is called: positional and keyword arguments, tensors by number."""

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    num_tensors: int

    @classmethod
    def of(cls, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> Arguments | None:
        """The form of a call; None for arguments other than tensors and plain constants."""
        numbers: dict[int, _Tensor] = {}

        def form(value: Any) -> Any:
            if isinstance(value, Tensor):
                return numbers.setdefault(id(value), _Tensor(number=len(numbers)))
            if type(value) in (tuple, list):
                return type(value)(form(part) for part in value)
            if type(value) is dict:
                return {key: form(part) for key, part in value.items()}
            if value is None or isinstance(value, _CONSTANTS):
                return value
            raise TypeError(type(value).__name__)

        try:
            return cls(
                positional=form(positional),
                keywords=form(dict(keywords)),
                num_tensors=len(numbers),
            )
        except TypeError:
            return None

    @classmethod
    def plain(cls, num_tensors: int) -> Arguments:
        """Tensors alone, one after another."""
        tensors = tuple(_Tensor(number=i) for i in range(num_tensors))
        return cls(positional=tensors, keywords={}, num_tensors=num_tensors)

    def filled(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these in the tensors' places."""
        return pytree.tree_map_only(
            _Tensor, lambda t: tensors[t.number], (self.positional, dict(self.keywords))
        )


_CONSTANTS = (bool, int, float, str, torch.dtype)


@dataclass(kw_only=True)
class OwnCall:
    """A call that a stage makes itself: what goes in, in order, and where outputs come from."""

    module: OwnModule
    nodes: frozenset[Node]
    first: Node
    arguments: Arguments
    inputs: tuple[Node, ...]
    """What stands for each of the arguments' tensors."""
    outputs: Mapping[Node, tuple[Any, ...]]
    """Where in the module's result the value of a node is: indices and keys."""


def calls_of(nodes: Sequence[Node]) -> list[Call]:
    """The outermost calls of the user's module, each with those inside it."""
    by_key: dict[str, Call] = {}
    count: Counter[str] = Counter()
    roots: list[Call] = []
    for node in nodes:
        if node.op == "placeholder" or node.op == "output":
            continue
        parent: Call | None = None
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if path != _ROOT and not path.startswith(_ROOT + "."):
                continue
            call = by_key.get(key)
            if call is None:
                name = path.removeprefix(_ROOT).removeprefix(".")
                call = by_key[key] = Call(path=name, number=count[name])
                count[name] += 1
                (roots if parent is None else parent.inside).append(call)
            call.nodes.append(node)
            parent = call
    return roots


def own_calls(
    cutter: StageCutter, index: int, draft: Draft, outside: Sequence[Node]
) -> list[OwnCall]:
    """The largest submodule calls that lie whole in a stage and can be proved equal to its nodes.

    `outside` are nodes that the stage hands on or returns.
    """
    found: list[OwnCall] = []
    stack = list(cutter.calls)
    read_by: dict[Node, set[Node]] = {}
    for node in draft.inside:
        for read in cutter.operands(node, index):
            read_by.setdefault(read, set()).add(node)
    while stack:
        call = stack.pop()
        owned = [node for node in call.nodes if node in cutter.owner]
        if owned and draft.inside.issuperset(owned):
            try:
                found.append(_own_call(cutter, index, draft, call, read_by, outside))
                continue
            except NotTheSameError as error:
                _log.debug("stage %d: %s", index, error)
        stack.extend(call.inside)
    return sorted(found, key=lambda own: cutter.position[own.first])


def _own_call(
    cutter: StageCutter,
    index: int,
    draft: Draft,
    call: Call,
    read_by: Mapping[Node, set[Node]],
    outside: Sequence[Node],
) -> OwnCall:
    nodes = frozenset(call.nodes)
    inside = [node for node in call.nodes if node in draft.inside]
    if any(draws_random(node) for node in call.nodes):
        raise NotTheSameError(f"module {call.path!r} draws random numbers")
    if any(node.op == "call_function" and writes_first(node) for node in call.nodes):
        # What a stage is given is a leaf of its graph, which nobody may write into.
        raise NotTheSameError(f"module {call.path!r} writes in place")
    returned = set(outside)
    results = [n for n in inside if n in returned or not read_by.get(n, set()) <= nodes]
    inputs: dict[Node, None] = {}
    for node in inside:
        for read in cutter.operands(node, index):
            if read in nodes or size_value(read) is not None:
                continue
            if read.op == "placeholder" and cutter.specs[read].kind.name != "USER_INPUT":
                if cutter.specs[read].kind.name == "CONSTANT_TENSOR":
                    raise NotTheSameError(f"module {call.path!r} reads constant {read.name!r}")
                continue
            inputs[read] = None
    module = cutter.submodule(call.path)
    proof = _Proof(cutter, call, module, tuple(inputs))
    if len(inputs) == proof.arguments.num_tensors:
        for order in itertools.islice(itertools.permutations(inputs), _MAX_ORDERS):
            outputs = proof.outputs_of(order, results)
            if outputs is not None:
                return OwnCall(
                    module=_own_module(cutter, call.path, module),
                    nodes=nodes,
                    first=inside[0],
                    arguments=proof.arguments,
                    inputs=order,
                    outputs=outputs,
                )
    raise NotTheSameError(f"module {call.path!r} does not compute what its nodes do")


def _own_module(cutter: StageCutter, path: str, module: nn.Module) -> OwnModule:
    prefix = f"{path}." if path else ""
    canonical = cutter.capture.canonical
    parameters, buffers = [], []
    for part_path, part in module.named_modules():
        start = f"{part_path}." if part_path else ""
        for leaf, parameter in part._parameters.items():
            name = canonical.get(prefix + start + leaf)
            # One that the loss does not depend on stays as it is.
            if parameter is not None and name in cutter.capture.graph.parameter_by_id:
                parameters.append((part, leaf, name))
        for leaf, buffer in part._buffers.items():
            if buffer is not None:
                buffers.append((part, leaf, prefix + start + leaf))
    return OwnModule(path=path, module=module, parameters=tuple(parameters), buffers=tuple(buffers))


class _Proof:
    """Runs a call's nodes, then its module, on meta tensors; see the head of the file."""

    def __init__(
        self, cutter: StageCutter, call: Call, module: nn.Module, inputs: tuple[Node, ...]
    ) -> None:
        self.cutter, self.call, self.inputs = cutter, call, inputs
        seen = cutter.seen_calls.get(call.path, [])
        is_seen = call.number < len(seen)
        found = seen[call.number] if is_seen else Arguments.plain(len(inputs))
        if found is None:
            raise NotTheSameError(f"module {call.path!r} is called with more than tensors")
        self.arguments: Arguments = found
        self.held: dict[str, Tensor] = {}
        try:
            with torch.inference_mode():
                self._prepare(module)
        except Exception as error:  # Whatever a user's forward may raise on meta tensors.
            raise NotTheSameError(
                f"module {call.path!r} cannot be followed: {type(error).__name__}: {error}"
            ) from error

    def _prepare(self, module: nn.Module) -> None:
        cutter = self.cutter
        self.held = {}
        for node in self.call.nodes:
            for read in cutter.reads(node):
                name = _weight_name(cutter, read)
                if name is not None and name not in self.held:
                    value = read.meta["val"]
                    self.held[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        self.values = {node: self._example(node) for node in self.inputs}
        self.shell = _shell(module, self.call.path, self.held, cutter.capture.canonical)
        self.shell.train()
        recorder = _Recorder([*self.held.values(), *self.values.values()])
        with recorder:
            made = self._run_nodes()
        self.wanted = recorder.steps
        self.number_of = {
            node: recorder.number(value)
            for node, value in made.items()
            if isinstance(value, Tensor)
        }

    def outputs_of(
        self, order: Sequence[Node], results: Sequence[Node]
    ) -> dict[Node, tuple[Any, ...]] | None:
        """Where in the module's result each node of `results` is; None where they differ."""
        recorder = _Recorder([*self.held.values(), *self.values.values()])
        positional, keywords = self.arguments.filled([self.values[node] for node in order])
        try:
            with torch.inference_mode(), recorder:
                result = self.shell(*positional, **keywords)
            places = {recorder.number(leaf): path for path, leaf in _leaves(result)}
        except Exception:  # Another order may suit the module's forward.
            return None
        if recorder.steps != self.wanted:
            return None
        found: dict[Node, tuple[Any, ...]] = {}
        for node in results:
            number = self.number_of.get(node)
            if number is None or number not in places:
                return None
            found[node] = places[number]
        return found

    def _example(self, node: Node) -> Tensor:
        value = node.meta["val"]
        batch = self.cutter.capture.batch
        sizes = [slope * batch + fixed for slope, fixed in map(self.cutter.size, value.shape)]
        return torch.empty(sizes, dtype=value.dtype, device="meta")

    def _run_nodes(self) -> dict[Node, Any]:
        values: dict[Node, Any] = dict(self.values)

        def value_of(node: Node) -> Any:
            if node in values:
                return values[node]
            name = _weight_name(self.cutter, node)
            if name is not None:
                return self.held[name]
            size = size_value(node)
            if size is None:
                raise NotTheSameError(f"node {node.name!r} is read but lies outside")
            slope, fixed = self.cutter.size(size)
            return slope * self.cutter.capture.batch + fixed

        for node in self.call.nodes:
            if "_assert" in str(node.target) or size_value(node) is not None:
                continue
            if node.op != "call_function":
                raise NotTheSameError(f"node {node.name!r} is a region of the program")
            args, kwargs = pytree.tree_map_only(Node, value_of, (node.args, dict(node.kwargs)))
            args, kwargs = pytree.tree_map_only(
                torch.device, lambda _: torch.device("meta"), (args, kwargs)
            )
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values


def _weight_name(cutter: StageCutter, node: Node) -> str | None:
    """The name of the parameter or buffer that a node stands for."""
    spec = cutter.specs.get(node)
    if spec is None or spec.kind.name == "USER_INPUT":
        return None
    name = str(spec.target).removeprefix("module.")
    return cutter.capture.canonical.get(name, name)


def _leaves(result: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors of a result, with the indices and keys that lead to them."""
    if isinstance(result, Tensor):
        yield path, result
    elif isinstance(result, (tuple, list)):
        for index, part in enumerate(result):
            yield from _leaves(part, (*path, index))
    elif isinstance(result, dict):
        for key, part in result.items():
            yield from _leaves(part, (*path, key))


def seen_calls(module: nn.Module, capture: Capture) -> dict[str, list[Arguments | None]]:
    """How every submodule is called, by path; None for arguments that depend on the batch.

    Found by running the module on meta tensors, as far as it comes, with two sizes of the batch.
    """
    first = _calls_with(module, capture, capture.batch)
    second = _calls_with(module, capture, capture.batch + 1)
    return {
        path: [a if a == b else None for a, b in zip(calls, second.get(path, []), strict=False)]
        for path, calls in first.items()
    }


def _calls_with(
    module: nn.Module, capture: Capture, batch: int
) -> dict[str, list[Arguments | None]]:
    found: dict[str, list[Arguments | None]] = {}
    on_meta: dict[str, Tensor] = {}
    axes = iter(leaf.batch_axis for leaf in capture.leaves)

    def example(tensor: Tensor) -> Tensor:
        axis, shape = next(axes), list(tensor.shape)
        if axis is not None:
            shape[axis] = shape[axis] // capture.batch * batch
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    def note_at(path: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(path, []).append(Arguments.of(args, kwargs))

        return note

    held = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    try:
        with torch.inference_mode():
            for path, tensor in held:
                name = capture.canonical.get(path, path)
                if name not in on_meta:
                    on_meta[name] = torch.empty_like(tensor, device="meta")
            shell = _shell(module, "", on_meta, capture.canonical)
            for path, part in shell.named_modules():
                part.register_forward_pre_hook(note_at(path), with_kwargs=True)
            ((args, kwargs, _), _) = pytree.tree_map_only(
                Tensor, example, capture.program.example_inputs
            )
            shell.train()(*args, **kwargs)
    except Exception as error:  # Whatever a user's forward may raise on meta tensors.
        _log.debug("not all calls were seen: %s: %s", type(error).__name__, error)
    return found


class _Recorder(TorchDispatchMode):
    """Notes every operator with its arguments; tensors count by who made them."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # No tensor dies, so no id is used twice.
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._kept)
            self._kept.append(tensor)

    def number(self, tensor: Tensor) -> int:
        """The tensor's number; NotTheSameError for one that nobody has seen."""
        number = self._numbers.get(id(tensor))
        if number is None:
            raise NotTheSameError("a tensor comes from nowhere")
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "_assert" in str(func):
            return func(*args, **kwargs)
        noted = pytree.tree_map_only(Tensor, lambda t: ("tensor", self.number(t)), (args, kwargs))
        set_ones = {key: value for key, value in noted[1].items() if value not in (None, False)}
        result = func(*args, **kwargs)
        self.steps.append((str(func), repr(noted[0]), repr(sorted(set_ones.items(), key=str))))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


def _shell(
    module: nn.Module, path: str, held: Mapping[str, Tensor], canonical: Mapping[str, str]
) -> nn.Module:
    """The module's structure with meta tensors, without hooks and not compiled."""
    inner = module._modules.get("_orig_mod")  # What torch.compile(module) wraps.
    if inner is not None:
        return _shell(inner, f"{path}._orig_mod".removeprefix("."), held, canonical)
    prefix = f"{path}." if path else ""
    shell = copy.copy(module)
    state = shell.__dict__
    for name in [key for key in state if key.endswith("_hooks") or "_hooks_" in key]:
        if isinstance(state[name], dict):
            state[name] = OrderedDict()
    state["_compiled_call_impl"] = None
    state["_parameters"] = {
        leaf: None if value is None else held.get(canonical.get(prefix + leaf, ""), value)
        for leaf, value in module._parameters.items()
    }
    state["_buffers"] = {
        leaf: None if value is None else held.get(prefix + leaf, value)
        for leaf, value in module._buffers.items()
    }
    state["_modules"] = {
        name: None if part is None else _shell(part, prefix + name, held, canonical)
        for name, part in module._modules.items()
    }
    return shell


class LentWeights:
    """Puts a rank's weights into the user's modules for one call, and the modules' own back.

    So the modules stay as the user gave them, and ranks of one process can share them. A call costs
    two assignments a module, however many weights it has.
    """

    def __init__(self, modules: Sequence[OwnModule]) -> None:
        self._modules = [own.module for own in modules]
        held = [
            *((part, "_parameters", leaf) for own in modules for part, leaf, _ in own.parameters),
            *((part, "_buffers", leaf) for own in modules for part, leaf, _ in own.buffers),
        ]
        self._slots: dict[tuple[int, str], tuple[nn.Module, list[tuple[str, int]]]] = {}
        for number, (part, attribute, leaf) in enumerate(held):
            slot = self._slots.setdefault((id(part), attribute), (part, []))
            slot[1].append((leaf, number))
        self._made: dict[int, tuple[Sequence[Tensor], list[_Lent]]] = {}
        self._before: list[_Lent] = []

    def lend(self, weights: Sequence[Tensor], start: int, *, training: bool) -> None:
        """Put `weights[start:]` in, in the order of StageProgram's own parameters, then buffers.

        A sequence that is passed again must hold the same tensors as before.
        """
        for module in self._modules:
            if module.training is not training:
                module.train(training)
        made = self._made.get(id(weights))
        if made is None or made[0] is not weights:
            if len(self._made) >= _MAX_VERSIONS:
                self._made.clear()
            made = self._made[id(weights)] = (weights, self._make(weights, start))
        for state, attribute, mine in made[1]:
            self._before.append((state, attribute, state[attribute]))
            state[attribute] = mine

    def take_back(self) -> None:
        """Put back what was there."""
        while self._before:
            state, attribute, own = self._before.pop()
            state[attribute] = own

    def _make(self, weights: Sequence[Tensor], start: int) -> list[_Lent]:
        return [
            (
                part.__dict__,
                attribute,
                {**part.__dict__[attribute], **{leaf: weights[start + i] for leaf, i in leaves}},
            )
            for (_, attribute), (part, leaves) in self._slots.items()
        ]
