"""A pipeline computes what one process computes: parameters after three steps, in float64."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from runtime.loopback_training import loopback_executor
from runtime.train_plans import Case, Cut, chain_cut, plan_of_cut, random_parts, zoo_case
from runtime.train_reference import train_plain
from weft.base.errors import UnsupportedError
from weft.plan.train_plan import TrainPlan
from weft.runtime.stage_executor import StepResult, TorchStageExecutor

TOLERANCE = 1e-9
MODELS = ("mmt", "case-study", "dlrm", "candle-uno", "unet", "gpt", "llama", "llava")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    # Adam forgives a wrong factor on the gradient, momentum does not.
    return torch.optim.SGD(list(values), lr=0.05, momentum=0.9, weight_decay=0.01)


def run(
    case: Case, plan: TrainPlan, num_steps: int = 3, **options: Any
) -> tuple[TorchStageExecutor, list[StepResult]]:
    """Train over loopback."""
    executor = loopback_executor(case, plan, optimizer=sgd, **options)
    return executor, list(executor.steps(num_steps))


def assert_equal(executor: TorchStageExecutor, module: nn.Module) -> None:
    """Every rank holds the reference's values of its parameters, and all that count are held."""
    wanted = dict(module.named_parameters())
    held: set[str] = set()
    for rank in executor.ranks:
        for name, p in rank.parameters.items():
            assert torch.allclose(p, wanted[name], rtol=0, atol=TOLERANCE), name
            held.add(name)
    assert held == {p.id for p in executor.capture.graph.parameters}


def check(case: Case, plan: TrainPlan, **options: Any) -> TorchStageExecutor:
    """Run and compare with one process."""
    executor, results = run(case, plan, **options)
    assert case.model.loss is not None
    reference = train_plain(
        case.model.module, case.model.loss, case.batches, sgd, clip_norm=options.get("clip_norm")
    )
    assert [r.loss for r in results] == pytest.approx(reference.losses, abs=TOLERANCE)
    if options.get("clip_norm"):
        assert [r.grad_norm for r in results] == pytest.approx(reference.norms, abs=TOLERANCE)
    assert_equal(executor, reference.module)
    return executor


@pytest.mark.parametrize("name", MODELS)
def test_chain_equals_one_process(name: str) -> None:
    case = zoo_case(name)
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3), 8)
    executor = check(case, plan)
    for rank in executor.ranks:
        for stage, peak in rank.peak_in_flight.items():
            assert peak == plan.stages[stage].num_in_flight


def test_model_of_fixed_batch_refuses_other_shares() -> None:
    case = zoo_case("llava")
    cut = chain_cut(case.capture.graph, 2, micro_batch=4)
    with pytest.raises(UnsupportedError, match=r"pixel_values.*fixed"):
        run(case, plan_of_cut(case.capture.graph, cut, 8))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llava"])
@pytest.mark.parametrize("seed", range(3))
def test_random_stage_graph_equals_one_process(name: str, seed: int) -> None:
    case = zoo_case(name, seed=seed)
    rng = random.Random(f"{name}{seed}")
    parts = random_parts(case.capture.graph, 4, rng)
    check(case, plan_of_cut(case.capture.graph, cut_at_random(parts, rng), 8))


def cut_at_random(parts: Sequence[tuple[int, ...]], rng: random.Random) -> Cut:
    """Micro-batch sizes, degrees, group sizes and recomputation that divide a batch of 8."""
    sizes = [rng.choice((2, 2, 4)) for _ in parts]
    return Cut(
        parts=tuple(parts),
        micro_batch=tuple(sizes),
        dp=tuple(rng.choice((1, 1, 2)) for _ in parts),
        k=tuple(rng.choice((1, 1, 2)) for _ in parts),
        recompute=tuple(rng.random() < 0.3 for _ in parts),
    )
