"""Tables on the terminal and the readable report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rows import Row, wide_console

from plan_bench.setting import Findings


def print_tables(part: Findings) -> None:
    """Every table and remark of one part."""
    for title, rows in part.tables.items():
        if not rows:
            continue
        table = Table(title=f"{title} (simulated)")
        for column in rows[0]:
            table.add_column(column.replace("_", " "))
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in rows[0]))
        wide_console().print(table)
    for remark in part.remarks:
        print(f"- {remark}")


def write_markdown(
    path: Path,
    found: Findings,
    machine: Mapping[str, str],
    command: str,
    seconds: Mapping[str, float],
) -> None:
    """The whole report: where and how, every row, every remark, every table."""
    lines = [
        "# Planning and simulation",
        "",
        "**Simulated**: throughputs and step times are those of the simulator on the `summit` "
        "preset (V100 16 GB, four a node), fp32. Search times, simulator speeds and memory are "
        "measured on the machine below. A ratio above 1 is in our favour; losing points are kept.",
        "",
        f"Command: `{command}`",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        f"- seconds by part: {', '.join(f'{k} {v}' for k, v in seconds.items())}",
        "",
        "## Claims",
        "",
        *_claims(found.rows),
        "",
        "## Remarks",
        "",
        *(f"- {remark}" for remark in found.remarks),
        "",
    ]
    for title, rows in found.tables.items():
        if rows:
            lines += [f"## {title}", "", *_markdown(rows), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _claims(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| claim | unit | ours | peer or limit | ratio | low | high | target | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        met = {None: "", True: "met", False: "**not met**"}[row.is_met]
        if row.is_met is None and row.ratio < 1:
            met = "behind"
        name = f"simulated: {row.claim}" if row.simulated else row.claim
        lines.append(
            f"| {name} | {row.unit} | {row.ours:.5g} | {row.peer:.5g} | {row.ratio:.3f} | "
            f"{row.ratio_low:.3f} | {row.ratio_high:.3f} | {row.promise} | {met} |"
        )
    return lines


def _markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(rows[0])
    head = "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    return [
        head,
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value).replace("|", "/").replace("\n", " ")
