"""Cells of one server at light, medium and heavy load: co-serving beside its baselines.

A `Server` runs a workload under one way of sharing; the simulated one does so under the virtual
clock, the real one in real time on the real executor. Everything here is written for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rows import Row

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
    step_time: StepTimeModel
    """What was measured, or is modelled, of its iterations."""

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


def outcome(policy: str, report: ServingReport, wanted: Objectives) -> Outcome:
    """Summary of a report."""
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
    )


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


def run_load(
    server: Server,
    workload: Workload,
    wanted: Objectives,
    *,
    frequencies: Sequence[int | None] = FREQUENCIES,
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """All ways of sharing at one load: inference alone first, then co-serving, then temporal."""
    slo = wanted.slo
    ways: list[tuple[str, FinetuneConfig, bool]] = [
        (
            "inference-only",
            FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY, slo=slo),
            False,
        ),
        ("coserve", FinetuneConfig(slo=slo), True),
    ]
    for frequency in frequencies:
        name = "temporal dynamic" if frequency is None else f"temporal {frequency}"
        config = FinetuneConfig(
            policy=FinetunePolicy.TEMPORAL, temporal_iterations=frequency, slo=slo
        )
        ways.append((name, config, True))
    found: list[Outcome] = []
    for name, config, has_job in ways:
        found.append(outcome(name, server.run(workload, config, has_job=has_job), wanted))
        say(f"  {_line(found[-1])}")
    return found


def _line(found: Outcome) -> str:
    itl = f"{found.itl_p99_s * 1e3:.0f}" if found.itl_p99_s is not None else "-"
    return (
        f"{found.policy:17} attainment {found.attainment:.1%}, finetuning "
        f"{found.finetune_tokens_per_s:,.0f} tokens/s, busy {found.busy_share:.0%}, "
        f"ITL p99 {itl} ms"
    )


def best_baseline(found: Sequence[Outcome], attainment: float) -> Outcome | None:
    """The fastest job among those that attain no less."""
    able = [o for o in found if o.attainment >= attainment and o.finetune_tokens_per_s > 0]
    return max(able, key=lambda o: o.finetune_tokens_per_s, default=None)


def load_rows(
    what: str,
    found: Sequence[Outcome],
    alone_tokens_per_s: float,
    *,
    spatial: Outcome | None,
    kept_target: float,
    checks_attainment: bool,
    simulated: bool,
) -> list[Row]:
    """The claims of one load."""
    inference, coserve, *temporal = found

    def row(claim: str, unit: str, ours: float, peer: float, **promise: float | None) -> Row:
        ratio = ours / max(peer, 1e-9)
        return Row(
            claim=f"{what}: {claim}",
            unit=unit,
            ours=ours,
            peer=peer,
            ratio=ratio,
            ratio_low=ratio,
            ratio_high=ratio,
            simulated=simulated,
            **promise,
        )

    left = max(0.0, 1.0 - inference.busy_share)
    rows = [
        row(
            "finetuning kept, against finetune-only x (1 - u)",
            "tokens/s",
            coserve.finetune_tokens_per_s,
            alone_tokens_per_s * left,
            target=kept_target,
        ),
        row("requests within SLO", "share", coserve.attainment, ATTAINED, target=1.0),
    ]
    if checks_attainment:
        rows.append(
            row(
                "attainment with a job, against without",
                "share",
                coserve.attainment,
                inference.attainment,
                target=1.0 - 0.01 / max(inference.attainment, 0.01),
            )
        )
    rivals = [*temporal, *([spatial] if spatial is not None else [])]
    best = best_baseline(rivals, coserve.attainment)
    if best is not None:  # Else nothing that attains as much finetunes at all.
        rows.append(
            row(
                f"finetuning at no less attainment (best is {best.policy})",
                "tokens/s",
                coserve.finetune_tokens_per_s,
                best.finetune_tokens_per_s,
                target=1.5,
            )
        )
    return rows


def as_data(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(o) for o in found]
