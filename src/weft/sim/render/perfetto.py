"""A timeline as a Chrome trace, for ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from weft.base.trace import TraceWriter
from weft.plan.program import KINDS
from weft.sim.timeline import Timeline


def trace(timeline: Timeline) -> TraceWriter:
    """One process a device: its actions, what it sends, and its memory; times in seconds."""
    writer = TraceWriter()
    names = dict(zip(timeline.devices, timeline.device_names, strict=True))
    critical = set(timeline.critical_rows.tolist())
    actions = timeline.actions
    for row in range(len(timeline)):
        duration_s = float(timeline.end_s[row] - timeline.start_s[row])
        if duration_s <= 0:
            continue
        job = timeline.jobs[timeline.job[row]]
        args = {"stage": int(actions.stage[row]), "job": job}
        if actions.micro_batch[row] >= 0:
            args["micro_batch"] = int(actions.micro_batch[row])
        if row in critical:
            args["critical"] = True
        writer.slice(
            names[int(timeline.device[row])],
            "compute" if not timeline.job[row] else f"job {job}",
            str(actions[row]),
            start_s=float(timeline.start_s[row]),
            duration_s=duration_s,
            category=str(KINDS[actions.kind[row]]),
            args=args,
        )
    _messages(writer, timeline, names)
    _memory(writer, timeline, names)
    return writer


def write_perfetto(timeline: Timeline, path: str | Path) -> None:
    """Write the trace to a file."""
    trace(timeline).write(path)


def _messages(writer: TraceWriter, timeline: Timeline, names: dict[int, str]) -> None:
    for row, message in enumerate(timeline.messages):
        kind = "gradient" if message.backward else "activation"
        start_s = float(timeline.message_start_s[row])
        writer.slice(
            names[message.sender],
            f"to {names[message.receiver]}",
            f"{kind} {message.sender_stage}→{message.receiver_stage} {message.sender_micro_batch}",
            start_s=start_s,
            duration_s=float(timeline.message_arrival_s[row]) - start_s,
            category="message",
            args={
                "bytes": message.num_bytes,
                "first_sample": message.first_sample,
                "num_samples": message.num_samples,
                "queued_s": start_s - float(timeline.message_ready_s[row]),
            },
        )


def _memory(writer: TraceWriter, timeline: Timeline, names: dict[int, str]) -> None:
    curve = timeline.memory
    # At one instant only the last value counts.
    last = np.ones(len(curve.time_s), dtype=bool)
    last[:-1] = (np.diff(curve.time_s) != 0) | (np.diff(curve.device) != 0)
    for row in np.nonzero(last)[0].tolist():
        writer.counter(
            names[int(curve.device[row])],
            "memory",
            time_s=float(curve.time_s[row]),
            values={"bytes": float(curve.used_bytes[row])},
        )
