"""Edges that only order two stages are waited for, and sent tensors are let go of in time."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.loopback_training import loopback_executor, sgd
from runtime.train_plans import chain_cut, plan_of_cut, zoo_case
from runtime.train_reference import train_plain
from weft.plan.action import ActionKind


@pytest.mark.parametrize("dp", [1, (1, 2, 1, 2)])
def test_a_sequential_plan_waits_for_edges_of_no_bytes(dp: Any) -> None:
    case = zoo_case("candle-uno")
    graph = case.capture.graph
    plan = plan_of_cut(graph, chain_cut(graph, 4, dp=dp), 8, sequential=True)
    orders = [(e.source, e.target) for e in plan.edges if e.is_order_only]
    assert orders
    runtime = loopback_executor(case, plan, record=True)
    results = list(runtime.steps(3))

    timeline = runtime.gather_timeline()
    times: dict[tuple[ActionKind, int, int], list[tuple[float, float]]] = {}
    for action, start_s, end_s in zip(
        timeline.actions, timeline.start_s.tolist(), timeline.end_s.tolist(), strict=True
    ):
        key = (action.kind, action.stage, action.micro_batch)
        times.setdefault(key, []).append((start_s, end_s))
    num_micro_batches = 3 * plan.num_micro_batches(0)
    for source, target in orders:
        for m in range(num_micro_batches):
            pairs = (
                (times[ActionKind.F, source, m], times[ActionKind.F, target, m]),
                (times[ActionKind.B, target, m], times[ActionKind.B, source, m]),
            )
            for first, second in pairs:
                assert max(end for _, end in first) <= min(start for start, _ in second)

    assert case.model.loss is not None
    wanted = train_plain(case.model.module, case.model.loss, case.batches, sgd)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, abs=1e-9)


@pytest.mark.parametrize(("schedule", "most"), [("1f1b", 4), ("2bw", 5)])
def test_a_sent_tensor_is_let_go_of_once_its_arrival_is_known(schedule: str, most: int) -> None:
    case = zoo_case("gpt", batch_size=32)
    graph = case.capture.graph
    plan = plan_of_cut(graph, chain_cut(graph, 3), 32, schedule=schedule)
    assert plan.num_micro_batches(0) == 16
    runtime = loopback_executor(case, plan, record=True)
    held: list[int] = []
    for rank in runtime.ranks:
        mail, send = rank.loop.mail, rank.loop.transport.send

        def counted(*arguments: Any, mail: Any = mail, send: Any = send) -> Any:
            held.append(len(mail._sends))
            return send(*arguments)

        rank.loop.transport.send = counted  # type: ignore[method-assign]
    list(runtime.steps(3))
    assert len(held) >= 3 * 4 * 16
    # At most what is in flight, not the 16 or 32 messages of a step.
    assert max(held) <= most
