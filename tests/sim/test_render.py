"""Pictures of timelines: what they show, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from plan.plans import chain, flat_cluster, stage_plan
from weft.base.errors import UnsupportedError
from weft.cluster.cluster import Link
from weft.plan.executor import Fill
from weft.plan.schedule import parse_schedule
from weft.plan.schedules import generate
from weft.sim.render import png
from weft.sim.render.layout import chart, seconds, size, ticks_s
from weft.sim.render.perfetto import trace, write_perfetto
from weft.sim.render.svg import svg, write_svg
from weft.sim.render.text import text_grid
from weft.sim.stage_executor import simulate

SVG = "{http://www.w3.org/2000/svg}"


def test_the_grid_is_the_schedule() -> None:
    timeline = simulate(chain(3, 4))
    assert text_grid(timeline, width=48).splitlines() == [
        "1f1b: 12 s per step (simulated)",
        "0.3333 samples/s  ·  bubble 33.3 %  ·  peak memory 3 B  ·  3 devices",
        "stage 0  n0:0 |F0──F1──F2──········B0──F3──B1──····B2──····B3──|",
        "stage 1  n0:1 |····F0──F1──····B0──F2──B1──F3──B2──····B3──····|",
        "stage 2  n0:2 |········F0──B0──F1──B1──F2──B2──F3──B3──········|",
    ]


def test_a_narrow_grid_falls_back_to_letters() -> None:
    lines = text_grid(simulate(chain(2, 40)), width=20).splitlines()
    assert all(len(line.split("|")[1]) == 20 for line in lines[2:])
    assert set(lines[3].split("|")[1]) <= set("FB·─0123456789")


def test_svg_holds_one_block_an_action_and_outlines_the_critical_path(tmp_path: Path) -> None:
    timeline = simulate(chain(3, 4))
    write_svg(timeline, tmp_path / "chart.svg")
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    blocks = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    assert len(blocks) == 3 * 8
    outlined = [rect for rect in blocks if rect.get("stroke") == "#c8102e"]
    assert len(outlined) == 12
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "1f1b: 12 s per step (simulated)" in texts
    assert {"forward", "backward", "idle", "critical path"} <= set(texts)
    assert "stage 2  n0:2" in texts


def test_replicas_share_a_lane_and_small_blocks_merge() -> None:
    plan = stage_plan([(0, 1)], 2, batch_size=8, micro_batch=2, dp=[2, 1])
    lanes = chart(simulate(plan)).lanes
    assert lanes == ("stage 0  n0:0 ×2", "stage 1  n0:2")
    long = simulate(chain(1, 4000))
    assert len(chart(long).blocks) == 8000
    assert svg(long).count("<title>") == 1
    assert "several, too short to draw" in svg(long)


def test_png_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    png.write_png(simulate(chain(3, 4)), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(png, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"weft\[plots\]"):
        png.write_png(simulate(chain(2, 2)), "never.png")
    assert not Path("never.png").exists()


def test_perfetto_has_actions_messages_and_memory(tmp_path: Path) -> None:
    link = Link(bandwidth_bytes_per_s=1.0, latency_s=0.5)
    timeline = simulate(chain(2, 2, saved_bytes=5, cluster=flat_cluster(2, link), edge_bytes=2))
    write_perfetto(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    compute = [e for e in events if e["ph"] == "X" and e["cat"] in ("F", "B")]
    assert [(e["name"], e["ts"], e["dur"]) for e in compute[:2]] == [
        ("0F0", 0.0, 1e6),
        ("0F1", 1e6, 1e6),
    ]
    sent = [e for e in events if e.get("cat") == "message"]
    assert len(sent) == 4
    assert sent[1]["args"]["queued_s"] == 1.0
    assert sent[1]["dur"] == 2.5e6
    memory = [e["args"]["bytes"] for e in events if e["ph"] == "C"]
    assert max(memory) == 10
    assert len(trace(timeline)) == len(events)


def test_fill_jobs_have_a_colour_and_a_track() -> None:
    plan = chain(2, 2)
    text = generate(plan).to_text().replace("1F0", "1BUBBLE 1F0")
    timeline = simulate(
        plan, parse_schedule(text), on_bubble=lambda b: Fill(job="ft", duration_s=1.0)
    )
    assert [block.text for block in chart(timeline).blocks if block.kind == "fill"] == ["ft"]
    assert "fill job" in svg(timeline)


def test_units_and_ticks() -> None:
    assert [seconds(value) for value in (2.0, 0.0335, 4e-6, 0.0)] == [
        "2 s",
        "33.5 ms",
        "4 µs",
        "0 s",
    ]
    assert [size(value) for value in (3, 2048, 3 * 2**30)] == ["3 B", "2 KiB", "3 GiB"]
    assert ticks_s(12.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert ticks_s(0.0) == [0.0]
