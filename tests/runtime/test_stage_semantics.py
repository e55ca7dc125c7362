"""What training means: loss weights, clipping, tying, dropout, schedules, weight versions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.loopback_training import loopback_executor, sgd
from runtime.train_plans import Case, case_of, chain_cut, plan_of_cut, zoo_case
from runtime.train_reference import train_plain
from weft.base.errors import ConfigError, UnsupportedError
from weft.model.zoo.registry import ZooModel
from weft.plan.action import COMPUTE_KINDS, ActionKind
from weft.runtime.batch_source import TensorSource
from weft.runtime.executor_config import LossScope
from weft.runtime.loopback import LoopbackWorld
from weft.runtime.stage_executor import NonFiniteLossError, TorchStageExecutor
from weft.sim.stage_executor import simulate

TOLERANCE = 1e-9


def adam(parameters: Any) -> torch.optim.Optimizer:
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    return torch.optim.AdamW(list(values), lr=1e-2)


def assert_same(executor: TorchStageExecutor, module: nn.Module) -> None:
    wanted = dict(module.named_parameters())
    for rank in executor.ranks:
        for name, p in rank.parameters.items():
            assert torch.allclose(p, wanted[name], rtol=0, atol=TOLERANCE), name


def reference(case: Case, **options: Any) -> Any:
    assert case.model.loss is not None
    return train_plain(case.model.module, case.model.loss, case.batches, sgd, **options)


def gpt_case(**options: Any) -> Case:
    return zoo_case("gpt", **{"num_steps": 3, **options})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "kfkb", "zero-bubble"])
def test_schedules_agree(schedule: str) -> None:
    case = gpt_case()
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3, dp=(1, 2, 1)), 8)
    executor = loopback_executor(case, plan, schedule=schedule)
    if schedule == "zero-bubble":
        assert ActionKind.W in executor.schedule.kinds
    list(executor.steps(3))
    assert_same(executor, reference(case).module)


def test_split_backward_leaves_weights_for_later() -> None:
    case = gpt_case()
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2), 8)
    executor = loopback_executor(case, plan, schedule="zero-bubble")
    loop = executor.ranks[0].loop
    left: list[int] = []
    run_weight_half = loop._run[ActionKind.W]

    def count(bound: Any, micro_batch: int) -> None:
        left.append(len(loop._halves[bound.action.stage, micro_batch].calls))
        run_weight_half(bound, micro_batch)

    loop._run[ActionKind.W] = count
    list(executor.steps(1))
    assert len(left) == 4
    assert min(left) > 0


def test_tied_weights_across_stages() -> None:
    case = gpt_case(tied=True)
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3, dp=(2, 1, 1)), 8)
    executor = loopback_executor(case, plan)
    holders = [rank.rank for rank in executor.ranks if "tokens.weight" in rank.parameters]
    assert holders == [0, 1, 3]
    assert [r.rank for r in executor.ranks if "tokens.weight" in r.owned] == [0]
    list(executor.steps(3))
    assert_same(executor, reference(case).module)


@pytest.mark.parametrize("limit", [1e-2, 1e6])
def test_clipping_by_global_norm(limit: float) -> None:
    case = gpt_case(tied=True)
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3, dp=(1, 2, 1)), 8)
    executor = loopback_executor(case, plan, clip_norm=limit)
    results = list(executor.steps(3))
    wanted = reference(case, clip_norm=limit)
    assert [r.grad_norm for r in results] == pytest.approx(wanted.norms, abs=TOLERANCE)
    assert (wanted.norms[0] > limit) == (limit < 1)
    assert_same(executor, wanted.module)


def test_small_buckets_start_before_the_end_of_backward() -> None:
    case = gpt_case()
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 1, dp=2), 8)
    executor = loopback_executor(case, plan, bucket_bytes=4096)
    sync = executor.ranks[0].sync
    assert sync is not None
    started: list[str] = []
    start = sync._start

    def note(bucket: Any) -> None:
        started.append(executor.ranks[0].loop.where)
        start(bucket)

    sync._start = note  # type: ignore[method-assign]
    list(executor.steps(3))
    assert "action 0B3" in started
    assert_same(executor, reference(case).module)


def masked_loss(logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens that count, and their number, which differs between micro-batches."""
    total = functional.cross_entropy(
        logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum", ignore_index=3
    )
    return total, (labels_BS != 3).sum()


def small_gpt(loss: Any, **options: Any) -> Case:
    case = gpt_case(**options)
    model = ZooModel(
        name="gpt",
        module=case.model.module,
        example_inputs=case.model.example_inputs,
        targets=case.model.targets,
        loss=loss,
    )
    batches = tuple(
        (inputs, (torch.where(labels < 10, 3, labels),)) for inputs, (labels,) in case.batches
    )
    return Case(model=model, capture=model.trace(), batches=batches)


def test_gradients_are_divided_by_the_global_weight() -> None:
    case = small_gpt(masked_loss)
    plan = plan_of_cut(
        case.capture.graph, chain_cut(case.capture.graph, 2, micro_batch=2, dp=(1, 2)), 8
    )
    executor = loopback_executor(case, plan)
    results = list(executor.steps(3))
    weights = [float((labels != 3).sum()) for _, (labels,) in case.batches]
    assert [r.weight for r in results] == weights
    wanted = reference(case)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, abs=TOLERANCE)
    assert_same(executor, wanted.module)


def test_accumulation_over_flushes() -> None:
    case = small_gpt(masked_loss, batch_size=16)
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2, dp=(1, 2)), 8)
    executor = loopback_executor(case, plan, accumulate=2)
    results = list(executor.steps(3))
    assert [r.num_samples for r in results] == [16] * 3
    assert_same(executor, reference(case).module)


class Heads(nn.Module):
    """Two tasks on one trunk, which is frozen at will."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.a = nn.Linear(8, 1)
        self.b = nn.Linear(8, 3)
        self.trunk.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.a(h).squeeze(-1), self.b(h)


def two_losses(outputs: tuple[Tensor, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {
        "a": functional.mse_loss(outputs[0], y),
        "b": (outputs[1] * y[:, None]).square().mean(),
    }


def heads_case(frozen: bool = False) -> Case:
    model = ZooModel(
        name="heads",
        module=Heads(frozen),
        example_inputs=(torch.zeros(2, 6),),
        targets=(torch.zeros(2),),
        loss=two_losses,
    )
    return case_of(model, batch_size=8, num_steps=3)


def test_losses_of_several_tasks_in_several_stages() -> None:
    case = heads_case()
    graph = case.capture.graph
    executor = loopback_executor(case, plan_of_cut(graph, chain_cut(graph, len(graph.ops)), 8))
    assert len(executor.cut.loss_stages) == 2
    results = list(executor.steps(3))
    wanted = reference(case)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, abs=TOLERANCE)
    assert_same(executor, wanted.module)


def test_measured_timeline_has_every_action_and_message() -> None:
    case = gpt_case()
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3, dp=(1, 2, 1)), 8)
    executor = loopback_executor(case, plan, record=True)
    list(executor.steps(3))
    measured = executor.gather_timeline()
    planned = simulate(plan, num_steps=3)
    assert (measured.num_steps, measured.devices) == (3, planned.devices)
    assert measured.step_time_s > 0
    for device in planned.devices:
        kinds = [*COMPUTE_KINDS, ActionKind.STEP, ActionKind.REDUCE_GRAD]
        wanted = planned.actions.take(planned.device == device).of_kinds(kinds)
        assert measured.actions.take(measured.device == device).of_kinds(kinds) == wanted
    assert len(measured.messages) == len(planned.messages)
    assert (measured.message_arrival_s >= measured.message_ready_s).all()
    assert (measured.end_s >= measured.start_s).all()


def test_frozen_stage_sends_no_gradient() -> None:
    case = heads_case(frozen=True)
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 4), 8)
    assert plan.stages[0].frozen
    executor = loopback_executor(case, plan)
    backward = [
        bound.action
        for rank in executor.ranks
        for bound in rank.loop.plan.first
        if bound.action.kind is ActionKind.RECV_B and bound.action.stage == 0
    ]
    assert backward == []
    list(executor.steps(3))
    assert executor.ranks[0].peak_in_flight == {0: 0}
    assert_same(executor, reference(case).module)


# Dropout


class Noisy(nn.Module):
    """Dropout of elements, of channels and of attention weights, and an inactive one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.qkv = nn.Linear(4, 12)
        self.down = nn.Linear(16, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        h_BF = functional.dropout(self.up(x_BF).tanh(), 0.3)
        h_BCW = functional.dropout2d(h_BF.view(-1, 4, 2, 2), 0.4).flatten(2)
        q, k, v = self.qkv(h_BCW).chunk(3, -1)
        y_BCW = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        return self.down(functional.dropout(y_BCW, 0.0).flatten(1)).squeeze(-1)


def noisy_case() -> Case:
    model = ZooModel(
        name="noisy",
        module=Noisy(),
        example_inputs=(torch.zeros(2, 6),),
        targets=(torch.zeros(2),),
        loss=functional.mse_loss,
    )
    return case_of(model, batch_size=8, num_steps=3)


@pytest.mark.parametrize(
    ("num_parts", "options"),
    [
        (2, {"micro_batch": 4, "dp": (2, 1)}),
        (4, {"micro_batch": (2, 4, 4, 8), "dp": (1, 2, 1, 1)}),
        (3, {"micro_batch": 1, "recompute": (True, False, True)}),
    ],
)
def test_dropout_does_not_depend_on_the_plan(num_parts: int, options: dict[str, Any]) -> None:
    case = noisy_case()
    graph = case.capture.graph
    whole = loopback_executor(
        case, plan_of_cut(graph, chain_cut(graph, 1, micro_batch=8), 8), seed=5
    )
    wanted = list(whole.steps(3))
    executor = loopback_executor(
        case, plan_of_cut(graph, chain_cut(graph, num_parts, **options), 8), seed=5
    )
    results = list(executor.steps(3))
    assert [r.loss for r in results] == pytest.approx([r.loss for r in wanted], abs=TOLERANCE)
    module = copy.deepcopy(case.model.module)
    module.load_state_dict(whole.ranks[0].parameters)
    assert_same(executor, module)
    plain = reference(case)
    assert abs(wanted[0].loss - plain.losses[0]) > 1e-6
    other = loopback_executor(case, whole.plan, seed=6)
    assert abs(next(other.steps(1)).loss - wanted[0].loss) > 1e-6


def test_evaluation_has_no_dropout_and_changes_nothing() -> None:
    case = noisy_case()
    graph = case.capture.graph
    executor = loopback_executor(case, plan_of_cut(graph, chain_cut(graph, 3, dp=(1, 2, 1)), 8))
    before = [{n: p.clone() for n, p in r.parameters.items()} for r in executor.ranks]
    found = executor.evaluate(TensorSource(case.capture, lambda step: case.batches[step]), 2)
    module = copy.deepcopy(case.model.module).eval()
    wanted = sum(
        float(functional.mse_loss(plain_noisy(module, *inputs), *targets).detach()) * 8
        for inputs, targets in case.batches[:2]
    )
    assert found.loss_sum == pytest.approx(wanted, abs=TOLERANCE)
    assert found.weight == 16
    for rank, held in zip(executor.ranks, before, strict=True):
        for name, p in rank.parameters.items():
            assert torch.equal(p, held[name])


def plain_noisy(module: Any, x: Tensor) -> Tensor:
    """Noisy's forward without its dropout."""
    h = module.up(x).tanh().view(-1, 4, 4)
    q, k, v = module.qkv(h).chunk(3, -1)
    y = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
    return module.down(y.flatten(1)).squeeze(-1)


# Two weight versions


def two_bw_reference(case: Case, num_steps: int) -> list[dict[str, Tensor]]:
    """W(t+1) = opt(W(t), gradient at W(t-1)), one process; the weights after every step."""
    module = copy.deepcopy(case.model.module)
    older = copy.deepcopy(module)
    loss: Any = case.model.loss
    optimizer = adam(list(module.parameters()))
    found: list[dict[str, Tensor]] = []
    for inputs, targets in case.batches[:num_steps]:
        older.zero_grad()
        loss(older(*inputs), *targets).backward()
        for p, q in zip(module.parameters(), older.parameters(), strict=True):
            p.grad = q.grad.clone() if q.grad is not None else None
        with torch.no_grad():
            for p, q in zip(module.parameters(), older.parameters(), strict=True):
                q.copy_(p)
        optimizer.step()
        found.append({name: p.detach().clone() for name, p in module.named_parameters()})
    return found


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("depth", "dp", "recompute"), [(2, 1, False), (4, 1, True), (2, 2, False)])
def test_two_versions_follow_the_rule(num_steps: int, depth: int, dp: int, recompute: bool) -> None:
    case = zoo_case("candle-uno", num_steps=7)
    cut = chain_cut(case.capture.graph, depth, dp=dp, recompute=recompute)
    plan = plan_of_cut(case.capture.graph, cut, 8, schedule="2bw")
    executor = loopback_executor(case, plan, optimizer=adam)
    assert not executor.schedule.is_synchronous
    wanted = two_bw_reference(case, num_steps)
    for result, weights in zip(executor.steps(num_steps), wanted, strict=True):
        assert result.loss > 0
        for rank in executor.ranks:
            for name, p in rank.parameters.items():
                assert torch.allclose(p, weights[name], rtol=0, atol=TOLERANCE), name
    assert sum(map(len, (r.optimizer.state for r in executor.ranks if r.optimizer))) > 0


def test_evaluation_between_steps_without_flushes_is_refused() -> None:
    case = zoo_case("candle-uno", num_steps=3)
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3), 8, schedule="2bw")
    executor = loopback_executor(case, plan)
    source = TensorSource(case.capture, lambda step: case.batches[step])
    steps = executor.steps(3)
    next(steps)
    with pytest.raises(ConfigError, match="micro-batches of the next step under way"):
        executor.evaluate(source, 1)
    assert len(list(steps)) == 2
    assert executor.evaluate(source, 1).weight == 8


def test_two_versions_resume() -> None:
    case = zoo_case("candle-uno", num_steps=6)
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3), 8, schedule="2bw")
    whole = loopback_executor(case, plan)
    list(whole.steps(6))
    first, second = loopback_executor(case, plan), loopback_executor(case, plan)
    list(first.steps(3))
    for old, new in zip(first.ranks, second.ranks, strict=True):
        assert old.previous is not None
        assert new.previous is not None
        with torch.no_grad():
            for name in new.parameters:
                new.parameters[name].copy_(old.parameters[name])
                new.previous[name].copy_(old.previous[name])
        assert new.optimizer is not None
        assert old.optimizer is not None
        new.optimizer.load_state_dict(old.optimizer.state_dict())
    list(second.steps(3, first_step=3))
    for one, other in zip(whole.ranks, second.ranks, strict=True):
        for name, p in one.parameters.items():
            assert torch.allclose(p, other.parameters[name], rtol=0, atol=TOLERANCE)


# Refusals


def test_loss_that_is_not_finite_stops_before_the_update() -> None:
    case = zoo_case("candle-uno")
    case.batches[1][0][0][5] = float("nan")
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2, dp=(1, 2)), 8)
    executor = loopback_executor(case, plan)
    run = executor.steps(3)
    next(run)
    before = [{n: p.clone() for n, p in r.parameters.items()} for r in executor.ranks]
    with pytest.raises(NonFiniteLossError, match=r"step 1 .* rank"):
        next(run)
    for rank, held in zip(executor.ranks, before, strict=True):
        for name, p in rank.parameters.items():
            assert torch.equal(p, held[name])


class Normed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.one(x)).sum(-1)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.BatchNorm1d(6), "BatchNorm in training mode"),
        (nn.RReLU(), "random numbers"),
        (Random(), "random numbers"),
    ],
)
def test_operators_that_depend_on_the_cut_are_refused(layer: nn.Module, match: str) -> None:
    model = ZooModel(
        name="normed",
        module=Normed(layer),
        example_inputs=(torch.zeros(2, 6),),
        targets=(torch.zeros(2),),
        loss=functional.mse_loss,
    )
    case = case_of(model, batch_size=8, num_steps=1)
    with pytest.raises(UnsupportedError, match=match):
        loopback_executor(
            case, plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 1), 8)
        )


def test_contrastive_loss_must_say_its_scope() -> None:
    case = zoo_case("clip")
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 3, dp=(1, 1, 1)), 8)
    with pytest.raises(UnsupportedError, match="loss_scope"):
        loopback_executor(case, plan)


@pytest.mark.parametrize("dp", [(1, 1, 1), (2, 2, 2)])
def test_contrastive_loss_within_micro_batches(dp: tuple[int, ...]) -> None:
    case = zoo_case("clip")
    cut = chain_cut(case.capture.graph, 3, micro_batch=4, dp=dp)
    executor = loopback_executor(
        case, plan_of_cut(case.capture.graph, cut, 8), loss_scope=LossScope.MICRO_BATCH
    )
    results = list(executor.steps(3))
    size = 4 // dp[-1]
    groups = [slice(a, a + size) for a in range(0, 8, size)]
    wanted = reference(case, groups=groups)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, abs=TOLERANCE)
    assert_same(executor, wanted.module)


@pytest.mark.parametrize(
    ("options", "match"), [({"clip_norm": 1.0}, "clip_norm"), ({"accumulate": 2}, "accumulate")]
)
def test_what_would_stall_a_schedule_without_flushes_is_refused(
    options: dict[str, Any], match: str
) -> None:
    case = zoo_case("candle-uno")
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2), 8, schedule="2bw")
    with pytest.raises(UnsupportedError, match=match):
        loopback_executor(case, plan, **options)


def test_lbfgs_is_refused() -> None:
    case = zoo_case("candle-uno")
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2), 8)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        loopback_executor(case, plan, optimizer=lambda held: torch.optim.LBFGS(list(held.values())))


def test_world_must_have_the_plans_size() -> None:
    case = zoo_case("candle-uno")
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2), 8)
    with pytest.raises(ValueError, match="2 devices, but the world has 3"):
        TorchStageExecutor(
            plan=plan,
            capture=case.capture,
            module=case.model.module,
            world=LoopbackWorld(3),
            source=TensorSource(case.capture, lambda step: case.batches[step]),
        )


@pytest.mark.parametrize(
    ("num_parts", "options"),
    [
        (1, {"micro_batch": 4, "dp": 2}),
        (3, {"micro_batch": (2, 2, 2)}),
        (2, {"micro_batch": (4, 2), "dp": (1, 2), "recompute": (False, True)}),
    ],
)
def test_contrastive_loss_over_the_whole_batch(num_parts: int, options: dict[str, Any]) -> None:
    case = zoo_case("clip")
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, num_parts, **options), 8)
    executor = loopback_executor(case, plan, schedule="gpipe", loss_scope=LossScope.GLOBAL)
    results = list(executor.steps(3))
    wanted = reference(case)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, abs=TOLERANCE)
    assert_same(executor, wanted.module)
    found = executor.evaluate(TensorSource(case.capture, lambda step: case.batches[step]), 1)
    loss: Any = case.model.loss
    inputs, targets = case.batches[0]
    assert found.loss_sum / found.weight == pytest.approx(
        float(loss(wanted.module(*inputs), *targets).detach()), abs=TOLERANCE
    )


def test_loss_over_the_whole_batch_needs_every_forward_first() -> None:
    case = zoo_case("clip")
    plan = plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2), 8)
    with pytest.raises(ValueError, match="gpipe"):
        loopback_executor(case, plan, loss_scope=LossScope.GLOBAL)


def test_autocast_keeps_float32_weights_and_sends_bfloat16() -> None:
    torch.manual_seed(0)
    model = ZooModel(
        name="heads",
        module=Heads(),
        example_inputs=(torch.zeros(2, 6),),
        targets=(torch.zeros(2),),
        loss=two_losses,
    )
    batches = tuple(((torch.randn(8, 6),), (torch.randn(8),)) for _ in range(3))
    case = Case(model=model, capture=model.trace(), batches=batches)
    cut = chain_cut(case.capture.graph, 3, dp=(1, 2, 1))
    executor = loopback_executor(
        case, plan_of_cut(case.capture.graph, cut, 8), autocast=torch.bfloat16
    )
    sent: set[torch.dtype] = set()
    for rank in executor.ranks:
        send = rank.loop.transport.send

        def note(tensor: Tensor, receiver: int, tag: int, send: Any = send) -> Any:
            sent.add(tensor.dtype)
            return send(tensor, receiver, tag)

        rank.loop.transport.send = note  # type: ignore[method-assign]
    results = list(executor.steps(3))
    assert sent == {torch.bfloat16}
    wanted = reference(case)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, rel=0.05)
    assert [r.loss for r in results] != pytest.approx(wanted.losses, rel=1e-6)
    for rank in executor.ranks:
        assert {p.dtype for p in rank.parameters.values()} <= {torch.float32}
