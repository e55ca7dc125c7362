"""The native CPU kernels beside torch's own operators, and beside what the machine can do.

    python benchmarks/cpu_kernels.py --threads 2 --rounds 5 --json -

Both sides of a row are timed in turns within each round; a round's figure is the fastest of a few
repeats over enough distinct weights that none stays in a cache. A ratio above 1 is in our favour.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from rows import Row, compare, describe_machine, print_rows, wide_console, write_json
from torch import Tensor

from weft.model.forward_step import ChunkRow, ForwardStep, GroupStep, RopeRows, kv_layers
from weft.model.kernels.cpu_kernels import CpuKernels
from weft.model.kernels.cpu_record import record
from weft.model.kernels.interface import AttentionShape
from weft.model.kernels.torch_kernels import TorchKernels
from weft.model.linear import make_linear

WEIGHTS_BYTES = 160e6
PAGE_TOKENS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """One row: two ways to do the same work, and how much work it is."""

    claim: str
    dtype: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    num_calls: int
    flop: float
    """Of one call."""
    num_bytes: float
    """Read at least once by one call."""


LINEAR_SHAPES = {
    "110 M": {"qkv": (2304, 768), "out": (768, 768), "gate-up": (4096, 768), "down": (768, 2048)},
    "embedded": {"qkv": (512, 256), "out": (256, 256), "gate-up": (1536, 256), "down": (256, 768)},
}
"""[N, K] of the products of each model."""
MAX_FLOP = 4e9
"""Of one repeat; it bounds how many distinct weights a repeat goes through."""


def linear_contests(dtype: str, rows: list[int], models: list[str]) -> list[Contest]:
    """Every product of each model, forward and gradient, beside torch and oneDNN.

    oneDNN's side multiplies with a copy of the weight in its own blocked order, made beforehand.
    """
    found: list[Contest] = []
    for model in models:
        for name, (n, k) in LINEAR_SHAPES[model].items():
            kind = DTYPES[dtype]
            count = max(2, min(40, int(WEIGHTS_BYTES / (n * k * kind.itemsize))))
            weights = [torch.randn(n, k).to(kind) for _ in range(count)]
            for m in rows:
                used = weights[: max(2, min(count, int(MAX_FLOP / (2 * m * n * k))))]
                found += _product_contests(f"{model} {name} {k}->{n}, {m} rows", dtype, m, used)
    return found


def _product_contests(claim: str, dtype: str, m: int, used: list[Tensor]) -> list[Contest]:
    n, k = used[0].shape
    x, dy = (torch.randn(m, size).to(DTYPES[dtype]) for size in (k, n))
    layers = [make_linear(weight) for weight in used]
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward beside torch": (
            lambda: [layer.forward(x) for layer in layers],
            lambda: [F.linear(x, weight) for weight in used],
        ),
        "gradient beside torch": (
            lambda: [layer.grad_input(dy) for layer in layers],
            lambda: [dy @ weight for weight in used],
        ),
    }
    if torch.backends.mkldnn.is_available():
        blocked = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in used]
        product = torch.ops.mkldnn._linear_pointwise
        sides["forward beside oneDNN"] = (
            sides["forward beside torch"][0],
            lambda: [product(x, weight, None, "none", [], "") for weight in blocked],
        )
    return [
        Contest(
            claim=f"{claim}, {side}",
            dtype=dtype,
            ours=ours,
            peer=peer,
            num_calls=len(used),
            flop=2.0 * m * n * k,
            num_bytes=n * k * x.element_size(),
        )
        for side, (ours, peer) in sides.items()
    ]


def gated_contest(dtype: str, num_rows: int) -> Contest:
    """Gate, up, SiLU and product in one call."""
    k, f = 768, 2048
    count = max(2, int(WEIGHTS_BYTES / (2 * f * k * DTYPES[dtype].itemsize)))
    weights = [torch.randn(2 * f, k).to(DTYPES[dtype]) for _ in range(count)]
    layers = [make_linear(weight) for weight in weights]
    x = torch.randn(num_rows, k).to(DTYPES[dtype])

    def by_torch() -> None:
        for weight in weights:
            gate, up = F.linear(x, weight).chunk(2, dim=-1)
            _ = F.silu(gate) * up

    return Contest(
        claim=f"silu(gate) * up {k}->{f}, {num_rows} rows",
        dtype=dtype,
        ours=lambda: [layer.forward_silu_mul(x) for layer in layers],
        peer=by_torch,
        num_calls=count,
        flop=4.0 * num_rows * f * k,
        num_bytes=2 * f * k * x.element_size(),
    )


class Attention:
    """RoPE, KV write and attention of one layer, for decodes or for one prompt."""

    def __init__(self, dtype: str, shape: AttentionShape, num_rows: int, context: int) -> None:
        kind, is_prompt = DTYPES[dtype], num_rows == 0
        num_seqs, num_tokens = (1, context) if is_prompt else (num_rows, num_rows)
        pages = -(-context // PAGE_TOKENS)
        tables = 1 + torch.randperm(num_seqs * pages).int().view(num_seqs, pages)
        last = torch.arange(context) if is_prompt else torch.full((num_rows,), context - 1)
        rows = torch.zeros_like(last) if is_prompt else torch.arange(num_rows)
        slots = tables[rows, last // PAGE_TOKENS].long() * PAGE_TOKENS + last % PAGE_TOKENS
        arena = torch.randn(
            1 + num_seqs * pages, 1, 2, shape.num_kv_heads, PAGE_TOKENS, shape.head_dim
        )
        chunk = ChunkRow(row=0, begin=0, end=context, first_prefix=1, context=context)
        self._kv = kv_layers(arena.to(kind))[0]
        self._group = GroupStep(
            page_tables=tables, write_slots=slots, page_tokens=PAGE_TOKENS, window=None
        )
        self._step = ForwardStep(
            token_ids=torch.zeros_like(last),
            positions=last,
            prefix_lens=(last + 1).int(),
            num_decodes=0 if is_prompt else num_rows,
            max_decode_context=0 if is_prompt else context,
            chunks=(chunk,) if is_prompt else (),
            groups=(self._group,),
        )
        width = shape.query_size + 2 * shape.kv_size
        self._qkv = torch.randn(num_tokens, width).to(kind)
        angles = torch.randn(num_tokens, shape.head_dim // 2)
        self._rope = RopeRows(cos=angles.cos().to(kind), sin=angles.sin().to(kind))
        seen = context * (context + 1) / 2 if is_prompt else num_rows * context
        what = f"prompt of {context}" if is_prompt else f"{num_rows} decodes at {context}"
        heads = f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}"
        ours, peer = CpuKernels(shape), TorchKernels(shape)
        self.contest = Contest(
            claim=f"attention, {what}, {heads}",
            dtype=dtype,
            ours=lambda: self._run(ours),
            peer=lambda: self._run(peer),
            num_calls=1,
            flop=4.0 * seen * shape.query_size,
            num_bytes=2.0 * num_seqs * context * shape.kv_size * kind.itemsize,
        )

    def _run(self, kernels: CpuKernels | TorchKernels) -> Tensor:
        self._group.scratch.clear()
        return kernels.attention(
            self._qkv.clone(), None, self._rope, self._kv, self._step, self._group
        )


def norm_contest(dtype: str) -> Contest:
    """RMS norm of a single row: what a launch costs."""
    shape = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=64, norm_eps=1e-5)
    x, weight = torch.randn(1, 768).to(DTYPES[dtype]), torch.ones(768).to(DTYPES[dtype])
    ours = CpuKernels(shape)
    return Contest(
        claim="rms_norm, 1 row of 768",
        dtype=dtype,
        ours=lambda: ours.rms_norm(x, weight, 1e-5),
        peer=lambda: F.rms_norm(x, (768,), weight, 1e-5),
        num_calls=1,
        flop=0.0,
        num_bytes=0.0,
    )


def replay_contest() -> Contest:
    """One recorded launch of a stack of small layers beside a call for each."""
    layers = [make_linear(torch.randn(256, 256) / 16) for _ in range(48)]
    x = torch.randn(1, 256)

    def forward() -> Tensor:
        y = x
        for layer in layers:
            y = layer.forward(y)
        return y

    replay = record(forward)
    return Contest(
        claim="48 layers of 256x256, 1 row: replayed beside eager torch",
        dtype="float32",
        ours=replay.run,
        peer=lambda: [F.linear(x, layer.dense()) for layer in layers],
        num_calls=1,
        flop=2.0 * 48 * 256 * 256,
        num_bytes=0.0,
    )


def best_s(work: Callable[[], object], num_repeats: int) -> float:
    """Wall seconds of the fastest of a few repeats."""
    walls: list[float] = []
    for _ in range(num_repeats):
        started_s = time.perf_counter()
        work()
        walls.append(time.perf_counter() - started_s)
    return min(walls)


class Limits:
    """Read bandwidth and GEMM rates, measured once in every round."""

    def __init__(self) -> None:
        self._memory = torch.ones(2**26)
        self._squares = {
            name: (torch.randn(1536, 1536).to(kind), torch.randn(1536, 1536).to(kind))
            for name, kind in DTYPES.items()
        }
        self.bytes_per_s: list[float] = []
        self.flop_per_s: dict[str, list[float]] = {name: [] for name in DTYPES}

    def measure(self) -> None:
        """Append one round."""
        memory_bytes = self._memory.numel() * self._memory.element_size()
        self.bytes_per_s.append(memory_bytes / best_s(self._memory.sum, 4))
        for name, (left, right) in self._squares.items():
            wall_s = best_s(lambda left=left, right=right: left @ right, 4)
            self.flop_per_s[name].append(2 * 1536**3 / wall_s)


def run(contests: list[Contest], num_rounds: int, num_repeats: int) -> tuple[list[Row], Limits]:
    """Time everything in turns and print each side's figures beside the limits."""
    limits = Limits()
    ours: list[list[float]] = [[] for _ in contests]
    peer: list[list[float]] = [[] for _ in contests]
    for contest in contests:
        contest.ours(), contest.peer()
    for _ in range(num_rounds):
        limits.measure()
        for index, contest in enumerate(contests):
            scale = 1e6 / contest.num_calls
            ours[index].append(best_s(contest.ours, num_repeats) * scale)
            peer[index].append(best_s(contest.peer, num_repeats) * scale)
    rows = [
        compare(f"{c.claim}, {c.dtype}", "us", mine, theirs, lower_is_better=True)
        for c, mine, theirs in zip(contests, ours, peer, strict=True)
    ]
    print_shares(contests, rows, limits)
    return rows, limits


def print_shares(contests: list[Contest], rows: list[Row], limits: Limits) -> None:
    """How near ours comes to the machine's limits of the same sitting (medians)."""
    bandwidth = statistics.median(limits.bytes_per_s)
    table = Table(title=f"shares of the machine: reads {bandwidth / 1e9:.1f} GB/s")
    for column in ("work", "us", "GB/s", "of reads", "GFLOP/s", "of GEMM"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for contest, row in zip(contests, rows, strict=True):
        gemm = statistics.median(limits.flop_per_s[contest.dtype])
        bytes_per_s, flop_per_s = (v / row.ours * 1e6 for v in (contest.num_bytes, contest.flop))
        table.add_row(
            row.claim,
            f"{row.ours:.1f}",
            f"{bytes_per_s / 1e9:.1f}",
            f"{bytes_per_s / bandwidth:.0%}",
            f"{flop_per_s / 1e9:.0f}",
            f"{flop_per_s / gemm:.0%}",
        )
    wide_console().print(table)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,256")
    parser.add_argument("--models", default="110 M,embedded", help="whose products")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--linears-only", action="store_true")
    parser.add_argument("--json", type=Path, help="a file, or - for stdout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    num_rows = [int(count) for count in options.rows.split(",")]
    small = AttentionShape(num_heads=8, num_kv_heads=4, head_dim=32, norm_eps=1e-5)
    wide = AttentionShape(num_heads=12, num_kv_heads=12, head_dim=64, norm_eps=1e-5)
    with torch.inference_mode():
        contests: list[Contest] = []
        for dtype in options.dtypes.split(","):
            contests += linear_contests(dtype, num_rows, options.models.split(","))
            if options.linears_only:
                continue
            contests += [gated_contest(dtype, count) for count in num_rows if count in (1, 8, 32)]
            for shape in (small, wide):
                contests += [Attention(dtype, shape, n, 256).contest for n in (1, 32)]
            contests.append(Attention(dtype, wide, 0, 1024).contest)
            contests.append(norm_contest(dtype))
        if not options.linears_only:
            contests.append(replay_contest())
        rows, limits = run(contests, options.rounds, options.repeats)
    machine = describe_machine() | {"threads": str(options.threads)}
    print(" · ".join(f"{key} {value}" for key, value in machine.items()))
    print_rows(rows, title="native CPU kernels beside torch (us, fastest of a round)")
    if options.json is not None:
        gemm = {name: statistics.median(rates) for name, rates in limits.flop_per_s.items()}
        reads = statistics.median(limits.bytes_per_s)
        write_json(options.json, rows, machine, read_bytes_per_s=reads, gemm_flop_per_s=gemm)


if __name__ == "__main__":
    main()
