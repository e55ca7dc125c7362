"""Cells of one server at light, medium and heavy load: co-serving beside its baselines.

A `Server` runs a workload under one way of sharing; the simulated one does so under the virtual
clock, the real one in real time on the real executor. Everything here is written for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rows import Row, single

from weft.cost.step_time import IterationShape, StepTimeModel
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy, LatencySlo
from weft.sim.serving_report import Percentiles, ServingReport
from weft.sim.trace_readers import read_trace
from weft.sim.workload import LengthRange, Workload

MEAN_PROMPT = 256
PROMPT_RANGE = LengthRange(low=16, high=768)
OUTPUT_RANGE = LengthRange(low=4, high=128)
LOADS = {"light": 0.3, "medium": 0.6, "heavy": 0.9}
FREQUENCIES: tuple[int | None, ...] = (1, 4, 16, 64, 128, 512, None)
ATTAINED = 0.99
KEPT_TARGET = {"float32": 0.8, "bfloat16": 1.0}
USUAL_CONTEXT = 256
LEAST_TPOT_S, LEAST_TTFT_S, PREFILLS = 0.020, 1.0, 10.0


def trace_workload(path: Path, num_requests: int) -> Workload:
    """The first requests of a trace, lengths scaled to a mean prompt of 256 tokens and clipped."""
    return (
        read_trace(path)
        .first(num_requests)
        .with_mean_prompt(MEAN_PROMPT, prompt_range=PROMPT_RANGE, output_range=OUTPUT_RANGE)
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objectives:
    """TPOT max(20 ms, 4 x a lone decode), TTFT max(1 s, 10 x the prompt's own prefill)."""

    tpot_s: float
    ttft_s: npt.NDArray[np.float64]
    """One a request."""

    @property
    def slo(self) -> LatencySlo:
        """As a policy is told."""
        return LatencySlo(tpot_s=self.tpot_s, ttft_s=LEAST_TTFT_S, ttft_prefills=PREFILLS)


def objectives(step_time: StepTimeModel, workload: Workload) -> Objectives:
    """What is promised to each request of a workload on an executor with these step times."""
    decode = IterationShape(
        num_decode_rows=1, num_sampled_rows=1, decode_context_tokens=float(USUAL_CONTEXT)
    )

    def prefill_s(count: int) -> float:
        shape = IterationShape(
            num_prefill_rows=1,
            num_prefill_tokens=count,
            num_sampled_rows=1,
            prefill_context_tokens=float(count),
            prefill_pairs=count * (count + 1) / 2,
        )
        return step_time.device_s(shape) + step_time.host_s(shape)

    lengths = workload.num_prompt_tokens.tolist()
    return Objectives(
        tpot_s=max(LEAST_TPOT_S, 4 * (step_time.device_s(decode) + step_time.host_s(decode))),
        ttft_s=np.array([max(LEAST_TTFT_S, PREFILLS * prefill_s(n)) for n in lengths]),
    )


class Server(Protocol):
    """Something that serves a workload and finetunes beside it."""

    name: str
    simulated: bool

    @property
    def step_time(self) -> StepTimeModel:
        """What was measured, or is modelled, of its iterations."""
        ...

    def run(self, workload: Workload, config: FinetuneConfig, *, has_job: bool) -> ServingReport:
        """Serve it once; the job lasts as long as the requests."""
        ...

    def finetune_tokens_per_s(self) -> float:
        """Speed of the job alone."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One way of sharing at one load."""

    policy: str
    attainment: float
    finetune_tokens_per_s: float
    busy_share: float
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    itl_p99_s: float | None
    ttft_p99_s: float | None
    throughput_tokens_per_s: float
    num_requests: int = 0
    finetune_share: float = 0.0
    """Of the duration: what iterations took beyond their inference, by the model of step times."""
    idle_share: float = 0.0
    head_room_share: float = 0.0
    """Of the duration: what the objectives left beside inference; the next three are parts of it
    that nothing was done with."""
    unused_behind_step: float = 0.0
    unused_no_piece: float = 0.0
    unused_rest: float = 0.0


def outcome(
    policy: str, report: ServingReport, wanted: Objectives, step_time: StepTimeModel | None = None
) -> Outcome:
    """Summary of a report; with `step_time` also where the time went."""
    requests = report.requests
    tpot, ttft = Percentiles.of(requests.tpot_s), Percentiles.of(requests.ttft_s)
    return Outcome(
        policy=policy,
        attainment=report.attainment(ttft_s=wanted.ttft_s, tpot_s=wanted.tpot_s),
        finetune_tokens_per_s=report.finetune_tokens_per_s,
        busy_share=report.busy_share,
        tpot_p50_s=tpot.p50,
        tpot_p99_s=tpot.p99,
        itl_p99_s=Percentiles.of(report.inter_token_s).p99,
        ttft_p99_s=ttft.p99,
        throughput_tokens_per_s=report.throughput_tokens_per_s,
        num_requests=len(requests.arrival_s),
        **({} if step_time is None else _accounts(report, step_time)),
    )


def _accounts(report: ServingReport, step_time: StepTimeModel) -> dict[str, float]:
    """Shares of the duration."""
    duration_s = max(report.duration_s, 1e-9)
    finetune_s = sum(
        max(0.0, (i.end_s - i.start_s) - step_time.device_s(i.shape.without_finetuning()))
        for i in report.iterations
        if i.shape.has_finetuning
    )
    found = {
        "finetune_share": finetune_s / duration_s,
        "idle_share": max(0.0, 1.0 - report.busy_share),
    }
    stats = report.finetune_stats
    if stats is not None:
        found["head_room_share"] = stats.head_room_s / duration_s
        for cause, seconds in stats.unused_head_room_s.items():
            found[f"unused_{cause.value.replace('-', '_')}"] = seconds / duration_s
    return found


def capacity(server: Server, workload: Workload, wanted: Objectives, rounds: int = 7) -> float:
    """Highest rate at which inference alone attains both objectives for 99 % of the requests."""
    config = FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY, slo=wanted.slo)

    def attains(rate: float) -> bool:
        report = server.run(workload.with_rate(rate), config, has_job=False)
        return outcome("", report, wanted).attainment >= ATTAINED

    saturated = server.run(workload.with_rate(1e6), config, has_job=False)
    high = 1.2 * len(workload) / saturated.duration_s
    low = high / 2
    while not attains(low):
        low, high = low / 2, low
    for _ in range(rounds):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attains(middle) else (low, middle)
    return low


SPATIAL = "spatial"
INFERENCE, COSERVE = "inference-only", "coserve"


def policies(frequencies: Sequence[int | None] = FREQUENCIES) -> list[str]:
    """Names of all ways of sharing, spatial apart."""
    temporal = ["temporal dynamic" if f is None else f"temporal {f}" for f in frequencies]
    return [INFERENCE, COSERVE, *temporal]


def config_of(policy: str, slo: LatencySlo) -> FinetuneConfig:
    """The settings that a name stands for."""
    if policy == COSERVE:
        return FinetuneConfig(slo=slo)
    if policy == INFERENCE:
        return FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY, slo=slo)
    frequency = policy.removeprefix("temporal ")
    return FinetuneConfig(
        policy=FinetunePolicy.TEMPORAL,
        temporal_iterations=None if frequency == "dynamic" else int(frequency),
        slo=slo,
    )


def run_policy(server: Server, workload: Workload, wanted: Objectives, policy: str) -> Outcome:
    """One cell."""
    report = server.run(workload, config_of(policy, wanted.slo), has_job=policy != INFERENCE)
    return outcome(policy, report, wanted, server.step_time)


def line(found: Outcome) -> str:
    """A cell in one line of text."""
    itl = f"{found.itl_p99_s * 1e3:.0f}" if found.itl_p99_s is not None else "-"
    text = (
        f"{found.policy:17} attainment {found.attainment:.1%}, finetuning "
        f"{found.finetune_tokens_per_s:,.0f} tokens/s, busy {found.busy_share:.0%} "
        f"(finetuning {found.finetune_share:.0%}), ITL p99 {itl} ms"
    )
    if found.policy == COSERVE:
        text += (
            f"; head-room {found.head_room_share:.0%}, unused behind steps "
            f"{found.unused_behind_step:.1%}, no piece {found.unused_no_piece:.1%}, rest "
            f"{found.unused_rest:.1%}"
        )
    return text


def best_baseline(found: Sequence[Outcome], attainment: float) -> Outcome | None:
    """The fastest job among those that attain so much."""
    able = [o for o in found if o.attainment >= attainment and o.finetune_tokens_per_s > 0]
    return max(able, key=lambda o: o.finetune_tokens_per_s, default=None)


def cell_rows(cell: Mapping[str, Any]) -> list[Row]:
    """The claims of one server at one load, as far as its outcomes tell them.

    A cell is what `coserve.py` writes: server, load, dtype, whether simulated, the speed of the job
    alone, and the outcomes.
    """
    found = {o["policy"]: Outcome(**o) for o in cell["outcomes"]}
    inference, coserve = found.get(INFERENCE), found.get(COSERVE)
    if inference is None or coserve is None:
        return []
    what = f"{cell['server']} {cell['load']}"
    alone_tokens_per_s: float = cell["finetune_only_tokens_per_s"]

    def row(claim: str, unit: str, ours: float, peer: float, *, target: float | None = None) -> Row:
        simulated: bool = cell["simulated"]
        return single(f"{what}: {claim}", unit, ours, peer, target=target, simulated=simulated)

    left = max(0.0, 1.0 - inference.busy_share)
    share = coserve.finetune_tokens_per_s / max(alone_tokens_per_s, 1e-9)
    rows = [
        row(
            f"finetuning kept, against finetune-only x (1 - u), u = {inference.busy_share:.2f}, "
            f"share kept {share:.2f}",
            "tokens/s",
            coserve.finetune_tokens_per_s,
            alone_tokens_per_s * left,
            target=KEPT_TARGET[cell["dtype"]],
        ),
        row("requests within SLO", "share", coserve.attainment, ATTAINED, target=1.0),
    ]
    if cell["load"] != "heavy":
        rows.append(
            row(
                "attainment with a job, against without",
                "share",
                coserve.attainment,
                inference.attainment,
                target=1.0 - 0.01 / max(inference.attainment, 0.01),
            )
        )
    rivals = [o for o in found.values() if o not in (inference, coserve)]
    best = best_baseline(rivals, min(coserve.attainment, ATTAINED))
    if best is not None:  # Else nothing that attains as much finetunes at all.
        rows.append(
            row(
                f"finetuning against the best that keeps the SLO for 99 % ({best.policy}, "
                f"{best.attainment:.1%}; ours {coserve.attainment:.1%})",
                "tokens/s",
                coserve.finetune_tokens_per_s,
                best.finetune_tokens_per_s,
                target=1.5,
            )
        )
    for rival in rivals:
        if rival.policy in ("temporal dynamic", SPATIAL) and rival is not best:
            rows.append(
                row(
                    f"finetuning over {rival.policy} (attains {rival.attainment:.1%}, ours "
                    f"{coserve.attainment:.1%})",
                    "tokens/s",
                    coserve.finetune_tokens_per_s,
                    rival.finetune_tokens_per_s,
                )
            )
    return rows


def as_data(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(o) for o in found]
