"""How to partition a bypass network over the devices that share a partitioned backbone.

Dependent parallelization (FlexLLM, arXiv 2402.18789 §5.1): the backbone's partition is fixed first
(Megatron-LM's: q, k, v, gate and up by columns, o and down by rows), so the states of the tensors
that a bypass reads and adds to are given; only its inside is free. The space is tiny: a rule for
each of its two products, and the cheapest transition on every edge. All of it is enumerated, priced
and the cheapest kept, forward and, for a trained bypass, backward.

Volumes are those of ring collectives over p devices, as bytes that each device sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

from weft.base.errors import ConfigError
from weft.cluster.device import DeviceType, Link
from weft.graph.adapter_spec import SUB_LAYERS, BypassTarget, Module

ROW_PARALLEL = frozenset((Module.O_PROJ, Module.DOWN_PROJ))
"""Targets whose input is partitioned and whose output is a partial sum."""


class TensorState(StrEnum):
    """A tensor over the devices: [replica or partial sums, tokens, features]."""

    REPLICATED = "[=,-,-]"
    TOKENS = "[-,|,-]"
    """Partitioned by tokens."""
    FEATURES = "[-,-,|]"
    """Partitioned by features."""
    PARTIAL = "[+,-,-]"
    """Each device holds an addend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """An operator between two states."""

    name: str
    volume: float
    """Bytes that each device sends, for each byte of the whole tensor."""
    num_messages: int
    """One after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductRule:
    """A legal assignment of states around one matrix product, and around its backward."""

    number: int
    input: TensorState
    output: TensorState
    splits_work: bool
    """Each device does 1/p of the arithmetic."""
    splits_weight: bool
    """Each device holds 1/p of the weight; else a copy."""
    grad_output: TensorState
    """The state in which the gradient of the output is read."""
    grad_input: TensorState
    """The state in which the gradient of the input comes out."""
    sums_weight_grad: bool = False
    """The weight's gradient is a partial sum on each device."""

    @property
    def symbol(self) -> str:
        """As the paper's figure numbers them."""
        return "①②③④⑤"[self.number - 1]


_R, _T, _F, _P = (
    TensorState.REPLICATED,
    TensorState.TOKENS,
    TensorState.FEATURES,
    TensorState.PARTIAL,
)


def _rule(
    number: int,
    states: tuple[TensorState, TensorState],
    grads: tuple[TensorState, TensorState],
    *,
    work: bool,
    weight: bool,
    sums: bool = False,
) -> ProductRule:
    return ProductRule(
        number=number,
        input=states[0],
        output=states[1],
        grad_output=grads[0],
        grad_input=grads[1],
        splits_work=work,
        splits_weight=weight,
        sums_weight_grad=sums,
    )


RULES = (
    _rule(1, (_R, _R), (_R, _R), work=False, weight=False),
    _rule(2, (_F, _P), (_R, _F), work=True, weight=True),
    _rule(3, (_T, _T), (_T, _T), work=True, weight=False, sums=True),
    _rule(4, (_R, _F), (_F, _P), work=True, weight=True),
    # A product of addends is an addend: legal where nothing non-linear stands before it.
    _rule(5, (_P, _P), (_R, _R), work=False, weight=False, sums=True),
)
"""The four of the paper's figure, and the one that lets a bypass of a row-parallel linear join its
all-reduce."""


def transition(source: TensorState, target: TensorState, num_devices: int) -> Transition:
    """The cheapest operator from one state to another; every pair has one."""
    p = num_devices
    share = (p - 1) / p
    if source is target:
        return Transition(name="none", volume=0.0, num_messages=0)
    match source, target:
        case TensorState.REPLICATED, TensorState.PARTIAL:
            return Transition(name="keep on one", volume=0.0, num_messages=0)
        case TensorState.REPLICATED, _:
            return Transition(name="slice", volume=0.0, num_messages=0)
        case TensorState.PARTIAL, TensorState.REPLICATED:
            return Transition(name="all-reduce", volume=2 * share, num_messages=2 * (p - 1))
        case TensorState.PARTIAL, _:
            return Transition(name="reduce-scatter", volume=share, num_messages=p - 1)
        case _, TensorState.PARTIAL:
            return Transition(name="pad with zeros", volume=0.0, num_messages=0)
        case _, TensorState.REPLICATED:
            return Transition(name="all-gather", volume=share, num_messages=p - 1)
        case _:
            return Transition(name="all-to-all", volume=share / p, num_messages=p - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """The backbone's states where a bypass touches it."""

    input: TensorState
    output: TensorState
    grad_output: TensorState
    grad_input: TensorState


def backbone_boundary(module: Module) -> Boundary:
    """The states that Megatron-LM's partition of a decoder layer gives around a module."""
    if module in ROW_PARALLEL:
        return Boundary(input=_F, output=_P, grad_output=_R, grad_input=_F)
    if module in SUB_LAYERS:  # Behind the all-reduce.
        return Boundary(input=_R, output=_R, grad_output=_R, grad_input=_R)
    return Boundary(input=_R, output=_F, grad_output=_F, grad_input=_P)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One legal partition of a bypass, with its price."""

    rules: tuple[ProductRule, ...]
    """Of its products in the order of the forward; none for (IA)³."""
    forward: tuple[str, ...]
    """Transitions that move bytes, in order."""
    backward: tuple[str, ...]
    forward_bytes: float
    """Sent by each device."""
    backward_bytes: float
    step_bytes: float
    """Sent by each device once an optimizer step, to sum weight gradients."""
    weight_params: float
    """Held by each device."""
    forward_s: float
    backward_s: float
    step_s: float

    @property
    def name(self) -> str:
        """Such as ②+④."""
        return "+".join(rule.symbol for rule in self.rules) or "sliced"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionSetting:
    """What prices depend on.

    Raises:
        ConfigError: fewer than 1 device, or no tokens.
    """

    num_devices: int
    num_tokens: int
    """Of an iteration, on this pipeline."""
    device_type: DeviceType
    link: Link
    dtype: str
    element_bytes: int
    is_trained: bool = True
    iterations_per_step: int = 1
    """Over which the summing of weight gradients is spread."""

    def __post_init__(self) -> None:
        for name in ("num_devices", "num_tokens", "iterations_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def bypass_candidates(target: BypassTarget, setting: PartitionSetting) -> tuple[Candidate, ...]:
    """Every legal partition of one bypass, the cheapest first; ties go to fewer weights."""
    boundary = backbone_boundary(target.module)
    if target.rank == 0:
        return (_elementwise(target, setting),)
    is_nonlinear = target.module in SUB_LAYERS
    found = [
        _price(target, boundary, (first, second), setting)
        for first, second in product(RULES, RULES)
        if not (is_nonlinear and second.number == 5)
    ]
    return tuple(sorted(found, key=lambda candidate: _rank(candidate, setting)))


def partition_bypass(target: BypassTarget, setting: PartitionSetting) -> Candidate:
    """The cheapest legal partition of one bypass."""
    return bypass_candidates(target, setting)[0]


def _rank(candidate: Candidate, setting: PartitionSetting) -> tuple[float, float]:
    seconds = candidate.forward_s
    if setting.is_trained:
        seconds += candidate.backward_s + candidate.step_s / setting.iterations_per_step
    return seconds, candidate.weight_params


def _elementwise(target: BypassTarget, setting: PartitionSetting) -> Candidate:
    """A scale follows the state of the tensor that it scales: nothing moves."""
    return Candidate(
        rules=(),
        forward=(),
        backward=(),
        forward_bytes=0.0,
        backward_bytes=0.0,
        step_bytes=0.0,
        weight_params=target.num_params / setting.num_devices,
        forward_s=0.0,
        backward_s=0.0,
        step_s=0.0,
    )


def _price(
    target: BypassTarget,
    boundary: Boundary,
    rules: tuple[ProductRule, ProductRule],
    setting: PartitionSetting,
) -> Candidate:
    first, second = rules
    widths = (target.in_features, target.rank, target.out_features)
    p = setting.num_devices
    forward = _edges(
        (boundary.input, first.input),
        (first.output, second.input),
        (second.output, boundary.output),
        widths=widths,
        num_devices=p,
    )
    backward = _edges(
        (boundary.grad_output, second.grad_output),
        (second.grad_input, first.grad_output),
        (first.grad_input, boundary.grad_input),
        widths=widths[::-1],
        num_devices=p,
    )
    params = (target.rank * target.in_features, target.rank * target.out_features)
    flops = [
        2.0 * setting.num_tokens * num / (p if rule.splits_work else 1)
        for num, rule in zip(params, rules, strict=True)
    ]
    summed = sum(num for num, rule in zip(params, rules, strict=True) if rule.sums_weight_grad)
    reduce = transition(_P, _R, p) if summed else transition(_R, _R, p)
    return Candidate(
        rules=rules,
        forward=_named(forward),
        backward=_named(backward),
        forward_bytes=_sent(forward, setting),
        backward_bytes=_sent(backward, setting),
        step_bytes=reduce.volume * summed * 4,  # gradients are summed in float32
        weight_params=sum(
            num / (p if rule.splits_weight else 1) for num, rule in zip(params, rules, strict=True)
        ),
        forward_s=_compute_s(flops, setting) + _moving_s(forward, setting),
        # Each product has two in its backward, one of them for the weight.
        backward_s=2 * _compute_s(flops, setting) + _moving_s(backward, setting),
        step_s=reduce.num_messages * setting.link.latency_s
        + reduce.volume * summed * 4 / setting.link.bandwidth_bytes_per_s,
    )


_Edge = tuple[Transition, int]
"""A transition, and the width of the tensor that it changes."""


def _edges(
    *pairs: tuple[TensorState, TensorState], widths: Sequence[int], num_devices: int
) -> list[_Edge]:
    return [
        (transition(source, target, num_devices), width)
        for (source, target), width in zip(pairs, widths, strict=True)
    ]


def _named(edges: Iterable[_Edge]) -> tuple[str, ...]:
    return tuple(f"{edge.name} of {width} wide" for edge, width in edges if edge.volume)


def _sent(edges: Iterable[_Edge], setting: PartitionSetting) -> float:
    whole = setting.num_tokens * setting.element_bytes
    return sum(edge.volume * width * whole for edge, width in edges)


def _moving_s(edges: Sequence[_Edge], setting: PartitionSetting) -> float:
    messages = sum(edge.num_messages for edge, _ in edges)
    moved = _sent(edges, setting) / setting.link.bandwidth_bytes_per_s
    return messages * setting.link.latency_s + moved


def _compute_s(flops: Iterable[float], setting: PartitionSetting) -> float:
    device = setting.device_type
    peak = device.peak(setting.dtype)
    return sum(device.launch_s + f / (peak * device.efficiency.fraction(f)) for f in flops if f)
