"""Dependent parallelization against the paper's four candidates and against real arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from weft.base.errors import ConfigError
from weft.cluster.device import DeviceType, Link
from weft.graph.adapter_spec import BypassTarget, Module
from weft.plan.bypass_partition import (
    RULES,
    PartitionSetting,
    ProductRule,
    TensorState,
    backbone_boundary,
    bypass_candidates,
    partition_bypass,
    transition,
)

GPU = DeviceType(
    name="toy",
    memory_bytes=1 << 34,
    peak_flops={"bfloat16": 1e14},
    memory_bandwidth_bytes_per_s=1e12,
)
SETTING = PartitionSetting(
    num_devices=4,
    num_tokens=256,
    device_type=GPU,
    link=Link(bandwidth_bytes_per_s=1e11, latency_s=1e-6),
    dtype="bfloat16",
    element_bytes=2,
)


def target(module: Module, *, n: int = 4096, m: int = 4096, rank: int = 16) -> BypassTarget:
    return BypassTarget(layer=0, module=module, in_features=n, out_features=m, rank=rank, scale=1.0)


def by_name(module: Module, setting: PartitionSetting = SETTING) -> dict[str, tuple[str, ...]]:
    return {c.name: c.forward for c in bypass_candidates(target(module), setting)}


def test_the_papers_four_candidates_for_a_column_parallel_output() -> None:
    """FlexLLM sheet §2.1: ①+④, ②+④, ③+③, ③+④, with the transitions of the figure."""
    found = by_name(Module.Q_PROJ)
    assert found["①+④"] == ()
    assert found["②+④"] == ("all-reduce of 16 wide",)
    assert found["③+③"] == ("all-to-all of 4096 wide",)
    assert found["③+④"] == ("all-gather of 16 wide",)


def test_the_volumes_of_the_four() -> None:
    candidates = {c.name: c for c in bypass_candidates(target(Module.Q_PROJ), SETTING)}
    low_rank_bytes, out_bytes = 256 * 16 * 2, 256 * 4096 * 2
    assert candidates["①+④"].forward_bytes == 0
    assert candidates["②+④"].forward_bytes == pytest.approx(2 * 3 / 4 * low_rank_bytes)
    assert candidates["③+③"].forward_bytes == pytest.approx(3 / 16 * out_bytes)
    assert candidates["③+④"].forward_bytes == pytest.approx(3 / 4 * low_rank_bytes)
    # What each device holds: A and B, copied or split.
    assert candidates["①+④"].weight_params == 16 * 4096 + 16 * 4096 / 4
    assert candidates["②+④"].weight_params == 2 * 16 * 4096 / 4
    assert candidates["③+③"].weight_params == 2 * 16 * 4096


def test_a_row_parallel_target_joins_the_backbones_all_reduce() -> None:
    """FlexLLM sheet §2.1: A by rows, B replicated, the output left as partial sums."""
    setting = replace(SETTING, is_trained=False)
    best = partition_bypass(target(Module.DOWN_PROJ, n=14336), setting)
    assert best.name == "②+⑤"
    assert best.forward == ()
    trained = {c.name: c for c in bypass_candidates(target(Module.DOWN_PROJ), SETTING)}["②+⑤"]
    assert trained.step_bytes == pytest.approx(2 * 3 / 4 * 16 * 4096 * 4)  # dB is summed once


def test_a_non_linear_bypass_never_adds_before_its_activation() -> None:
    assert all(
        candidate.rules[1].number != 5
        for candidate in bypass_candidates(target(Module.MLP), SETTING)
    )


def test_a_scale_moves_nothing() -> None:
    scale = replace(target(Module.K_PROJ), rank=0)
    best = partition_bypass(scale, SETTING)
    assert (best.name, best.forward_bytes, best.weight_params) == ("sliced", 0.0, 1024.0)


def test_prices_decide() -> None:
    """A slow link forbids talking; a slow device asks for split work."""
    slow_link = replace(SETTING, link=Link(bandwidth_bytes_per_s=1e6, latency_s=1.0))
    assert partition_bypass(target(Module.Q_PROJ), replace(slow_link, is_trained=False)).name in (
        "①+④",
        "①+①",
    )
    slow = replace(GPU, peak_flops={"bfloat16": 1e8})
    slow_device = replace(SETTING, device_type=slow, num_tokens=4096, is_trained=False)
    rules = partition_bypass(target(Module.Q_PROJ), slow_device).rules
    assert all(rule.splits_work for rule in rules)


def test_one_device_moves_nothing() -> None:
    alone = replace(SETTING, num_devices=1)
    for candidate in bypass_candidates(target(Module.Q_PROJ), alone):
        assert candidate.forward_bytes == candidate.backward_bytes == candidate.step_bytes == 0


@pytest.mark.parametrize("name", ["num_devices", "num_tokens", "iterations_per_step"])
def test_a_setting_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(SETTING, **{name: 0})


# ---- the rules are true: run them on numbers, one array a device ----

P = 3


def spread(whole: np.ndarray, state: TensorState, rng: np.random.Generator) -> list[np.ndarray]:
    match state:
        case TensorState.REPLICATED:
            return [whole] * P
        case TensorState.TOKENS:
            return np.split(whole, P, axis=0)
        case TensorState.FEATURES:
            return np.split(whole, P, axis=1)
        case TensorState.PARTIAL:
            parts = [rng.normal(size=whole.shape) for _ in range(P - 1)]
            return [*parts, whole - sum(parts)]


def gather(parts: list[np.ndarray], state: TensorState) -> np.ndarray:
    match state:
        case TensorState.REPLICATED:
            assert all(np.allclose(part, parts[0]) for part in parts)
            return parts[0]
        case TensorState.TOKENS:
            return np.concatenate(parts, axis=0)
        case TensorState.FEATURES:
            return np.concatenate(parts, axis=1)
        case TensorState.PARTIAL:
            return np.sum(parts, axis=0)


def weight_of(rule: ProductRule, weight: np.ndarray) -> list[np.ndarray]:
    if not rule.splits_weight:
        return [weight] * P
    return np.split(weight, P, axis=0 if rule.number == 2 else 1)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.symbol)
def test_each_rule_computes_the_product_and_its_gradients(rule: ProductRule) -> None:
    rng = np.random.default_rng(rule.number)
    x, w, dy = rng.normal(size=(6, 9)), rng.normal(size=(9, 12)), rng.normal(size=(6, 12))
    weights = weight_of(rule, w)
    xs = spread(x, rule.input, rng)
    ys = [a @ b for a, b in zip(xs, weights, strict=True)]
    assert np.allclose(gather(ys, rule.output), x @ w)
    dys = spread(dy, rule.grad_output, rng)
    dxs = [a @ b.T for a, b in zip(dys, weights, strict=True)]
    assert np.allclose(gather(dxs, rule.grad_input), dy @ w.T)
    dws = [a.T @ b for a, b in zip(xs, dys, strict=True)]
    if rule.sums_weight_grad:
        assert np.allclose(np.sum(dws, axis=0), x.T @ dy)
    elif rule.splits_weight:
        assert np.allclose(np.concatenate(dws, axis=0 if rule.number == 2 else 1), x.T @ dy)
    else:
        assert all(np.allclose(dw, x.T @ dy) for dw in dws)
    assert rule.splits_work == all(
        a.shape[0] * b.size < x.shape[0] * w.size for a, b in zip(xs, weights, strict=True)
    )


@pytest.mark.parametrize(("source", "goal"), product(TensorState, repeat=2))
def test_transitions_that_cost_nothing_need_nothing_from_others(
    source: TensorState, goal: TensorState
) -> None:
    """Local operators exist exactly from a replica, and into partial sums."""
    is_local = source is goal or source is TensorState.REPLICATED or goal is TensorState.PARTIAL
    assert (transition(source, goal, P).volume == 0) == is_local


def test_boundaries_are_megatrons() -> None:
    column, row = backbone_boundary(Module.GATE_PROJ), backbone_boundary(Module.O_PROJ)
    assert (column.input, column.output) == (TensorState.REPLICATED, TensorState.FEATURES)
    assert (row.input, row.output) == (TensorState.FEATURES, TensorState.PARTIAL)
    assert column.grad_input is TensorState.PARTIAL  # summed by the backbone's all-reduce
    assert row.grad_input is TensorState.FEATURES
