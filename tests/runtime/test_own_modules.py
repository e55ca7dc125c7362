"""Stages call the user's own submodules where the cut falls on their borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.test_stage_numerics import check, run
from runtime.train_plans import Case, Cut, case_of, chain_cut, plan_of_cut
from weft.model.zoo.registry import ZooModel
from weft.plan.train_plan import TrainPlan
from weft.runtime.stage_executor import TorchStageExecutor

BATCH = 8


class Block(nn.Module):
    """Two linears beside a skip; a hook on it sees both."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x)))) * scale


class Pair(nn.Module):
    """Two tensors in, in an order that the graph does not show at once; a tuple out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("bias", torch.linspace(0.0, 1.0, width))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        right = self.right(b) + self.bias
        return self.left(a) - right, right


class Towers(nn.Module):
    """Branches that meet in a module of two inputs; the parent adds, scales and heads them."""

    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = Block(width, dropout)
        self.other = nn.Sequential(nn.Linear(3, width), nn.Tanh())
        self.meet = Pair(width)
        self.offset = nn.Parameter(torch.zeros(width))
        self.last = Block(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.first(x), self.other(y)
        low, high = self.meet(a, b)
        return self.head(self.last(low * high + self.offset, scale=0.5))


def squared(output: Tensor, wanted: Tensor) -> Tensor:
    return ((output - wanted) ** 2).mean()


def towers(**options: Any) -> Case:
    torch.manual_seed(0)
    model = ZooModel(
        name="towers",
        module=Towers(**options),
        example_inputs=(torch.zeros(2, 4), torch.zeros(2, 3)),
        targets=(torch.zeros(2, 2),),
        loss=squared,
    )
    return case_of(model, batch_size=BATCH, num_steps=3)


def plan_by_module(
    case: Case, stages: list[tuple[str, ...]], *, schedule: str = "1f1b", **options: Any
) -> TrainPlan:
    """Operators whose module path starts with a stage's prefix; what is left goes to the last."""
    graph = case.capture.graph
    parts: list[list[int]] = [[] for _ in stages]
    for i, op in enumerate(graph.ops):
        home = next(
            (s for s, prefixes in enumerate(stages) if op.id.startswith(prefixes)), len(stages) - 1
        )
        parts[home].append(i)
    each = {
        name: options.get(name, default)
        for name, default in (("micro_batch", 2), ("dp", 1), ("k", 1), ("recompute", False))
    }
    cut = Cut(parts=tuple(map(tuple, parts)), **{k: (v,) * len(stages) for k, v in each.items()})
    return plan_of_cut(graph, cut, BATCH, schedule=schedule)


BORDERS: list[tuple[str, ...]] = [("first",), ("other",), ("meet",), ("last", "head")]


def paths(executor: TorchStageExecutor) -> list[list[str]]:
    return [[own.path for own in stage.own] for stage in executor.cut.stages]


@pytest.mark.parametrize(
    "options",
    [{}, {"dp": 2}, {"recompute": True}, {"schedule": "gpipe", "micro_batch": 4}, {"k": 2}],
    ids=str,
)
def test_stages_on_module_borders_run_the_users_modules(options: dict[str, Any]) -> None:
    case = towers()
    plan = plan_by_module(case, BORDERS, **options)
    executor = check(case, plan)
    # `last` is called with a constant that no tensor shows; the parent's offset stays beside it.
    assert paths(executor) == [["first"], ["other"], ["meet"], ["last", "head"]]
    assert [stage.is_own for stage in executor.cut.stages] == [True, True, True, False]
    assert "modules first" in executor.cut.stages[0].how_built


def test_own_modules_and_the_exported_graph_agree() -> None:
    case = towers()
    plan = plan_by_module(case, BORDERS)
    own, own_results = run(case, plan)
    graph, graph_results = run(case, plan, own_modules=False)
    assert paths(graph) == [[], [], [], []]
    assert all("exported graph" in stage.how_built for stage in graph.cut.stages)
    assert [r.loss for r in own_results] == [r.loss for r in graph_results]
    for one, other in zip(own.ranks, graph.ranks, strict=True):
        for name, p in one.parameters.items():
            assert torch.allclose(p, other.parameters[name], rtol=0, atol=1e-9), name


def test_forward_and_backward_hooks_fire_once_a_micro_batch() -> None:
    case = towers()
    seen: list[tuple[str, int]] = []
    module = case.model.module

    def note(name: str) -> Any:
        return lambda _, inputs, output: seen.append((name, len(inputs[0])))

    module.first.register_forward_hook(note("first"))  # pyright: ignore
    module.first.up.register_forward_hook(note("first.up"))  # pyright: ignore
    backward: list[Any] = []
    module.other[0].register_full_backward_hook(  # pyright: ignore
        lambda _, grads_in, grads_out: backward.append(grads_out[0].shape)
    )
    run(case, plan_by_module(case, BORDERS), num_steps=1)
    assert seen.count(("first", 2)) == 4
    assert seen.count(("first.up", 2)) == 4
    assert len(seen) == 8  # proving that the module fits its nodes set off none
    assert backward == [(2, 4)] * 4


def test_the_users_module_keeps_its_own_weights() -> None:
    case = towers()
    module = case.model.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    held = {name: id(p) for name, p in module.named_parameters()}
    executor, _ = run(case, plan_by_module(case, BORDERS))
    assert {name: id(p) for name, p in module.named_parameters()} == held
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]), name
    assert not torch.equal(
        executor.ranks[0].parameters["first.up.weight"], before["first.up.weight"]
    )


def test_submodules_compiled_in_place_run_compiled() -> None:
    """A backend of our own sees the submodule's graph, and the result stays the same."""
    case = towers()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    case.model.module.first.compile(backend=backend)  # pyright: ignore
    executor = check(case, plan_by_module(case, BORDERS))
    assert paths(executor)[0] == ["first"]
    assert compiled  # not the exported graph


def test_a_wrapped_submodule_trains_by_its_parts() -> None:
    """torch.export forgets that torch.compile(module) was called, so its parts are found."""
    torch._dynamo.reset()
    towers_of = towers().model
    module: Any = towers_of.module
    module.first = torch.compile(module.first, backend="eager")
    case = case_of(towers_of, batch_size=BATCH, num_steps=3)
    executor = check(case, plan_of_cut(case.capture.graph, chain_cut(case.capture.graph, 2), BATCH))
    assert "first._orig_mod.up" in paths(executor)[0]


def test_modules_that_write_in_place_run_from_the_exported_graph() -> None:
    case = towers()
    case.model.module.other[1] = nn.ReLU(inplace=True)  # pyright: ignore
    case = case_of(case.model, batch_size=BATCH, num_steps=3)
    executor = check(case, plan_by_module(case, BORDERS))
    assert paths(executor)[1] == ["other.0"]


class Attentive(nn.Module):
    """Calls with one tensor twice, nested and named ones, and with a number from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.product = Product()
        self.mixer, self.sized, self.head = Mixer(), Sized(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.product(x, x)
        mixed = self.mixer(parts=(y, x), scales={"left": 0.5, "right": 2.0})
        return self.head(self.sized(mixed["sum"], x.shape[0]).mean(1))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.left(q) * self.right(k), None


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)

    def forward(self, parts: tuple[Tensor, Tensor], scales: dict[str, float]) -> dict[str, Tensor]:
        left = self.left(parts[0]) * scales["left"]
        return {"left": left, "sum": left + parts[1] * scales["right"]}


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, num_samples: int) -> Tensor:
        return self.inner(x) + torch.arange(num_samples, dtype=x.dtype).view(-1, 1, 1) * 0


def test_modules_are_called_as_their_parent_calls_them() -> None:
    torch.manual_seed(0)
    model = ZooModel(
        name="attentive",
        module=Attentive(),
        example_inputs=(torch.zeros(2, 3, 4),),
        targets=(torch.zeros(2, 2),),
        loss=squared,
    )
    case = case_of(model, batch_size=BATCH, num_steps=3)
    stages: list[tuple[str, ...]] = [("product",), ("mixer",), ("sized", "head")]
    executor = check(case, plan_by_module(case, stages, micro_batch=4))
    # A number that depends on the batch would be that of the example.
    assert paths(executor) == [["product"], ["mixer"], ["sized.inner", "head"]]


class Twice(nn.Module):
    """One block, called again on what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(x)))


def test_a_module_that_is_called_twice_is_called_twice() -> None:
    torch.manual_seed(0)
    model = ZooModel(
        name="twice",
        module=Twice(),
        example_inputs=(torch.zeros(2, 4),),
        targets=(torch.zeros(2, 2),),
        loss=squared,
    )
    case = case_of(model, batch_size=BATCH, num_steps=3)
    calls: list[int] = []
    model.module.block.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    executor = check(case, plan_by_module(case, [("block",), ("head",)]))
    assert paths(executor) == [["block", "block"], ["head"]]
    assert len(calls) == 2 * 4 * 3 + 2 * 3  # the pipeline's, and the reference's copy


def test_a_cut_within_a_module_calls_the_parts_that_stay_whole() -> None:
    case = towers()
    plan = plan_by_module(case, [("first.up",), ("first", "other"), ("meet", "last", "head")])
    executor = check(case, plan)
    assert paths(executor)[:2] == [["first.up"], ["other", "first.down"]] or paths(executor)[
        :2
    ] == [["first.up"], ["first.down", "other"]]


def test_dropout_stays_with_the_exported_graph() -> None:
    """The user's module would draw numbers that depend on the plan; ours are seeded."""
    case = towers(dropout=0.5)
    plan = plan_by_module(case, BORDERS)
    own, own_results = run(case, plan)
    assert paths(own)[0] == ["first.up", "first.down"]
    _, graph_results = run(case, plan, own_modules=False)
    assert [r.loss for r in own_results] == [r.loss for r in graph_results]


def test_a_split_backward_runs_from_the_exported_graph() -> None:
    case = towers()
    executor = check(case, plan_by_module(case, BORDERS, schedule="zero-bubble"))
    assert paths(executor) == [[], [], [], []]


def test_two_weight_versions_swap_within_the_users_modules() -> None:
    case = towers()
    plan = plan_by_module(case, [("first", "other"), ("meet", "last", "head")], schedule="2bw")
    own, own_results = run(case, plan)
    assert paths(own)[0] == ["first", "other"]
    _, graph_results = run(case, plan, own_modules=False)
    assert [r.loss for r in own_results] == [r.loss for r in graph_results]


def test_evaluation_runs_the_users_modules_in_their_own_mode() -> None:
    case = towers()
    modes: list[bool] = []
    case.model.module.first.register_forward_hook(  # pyright: ignore
        lambda module, *_: modes.append(module.training)
    )
    executor, _ = run(case, plan_by_module(case, BORDERS), num_steps=1)
    executor.evaluate(executor.ranks[0].loop.source, 1)
    assert modes == [True] * 4 + [False] * 4
