"""What adapters cost a batch: 64 rows of the 110 M shape, each through an adapter of its own.

Every round times the same batch without adapters (as it is served: one recorded launch) and with
each mix, in turns. Two kinds of rows:

- decode speed with 64 adapters of ranks 4, 8, 16 and 32 on q, k, v and o, against no adapters
- the time of a step against (the step without adapters + the bytes of its adapters / bandwidth)

    python benchmarks/adapters.py --json adapters.json                       # 4 minutes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_models import RAND110
from rows import Row, compare, describe_machine, print_rows, write_json

from weft.engine.batch import AdapterRef, Batch, SegmentKind, SequenceStart
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.model.adapters.weights import (
    AdapterWeights,
    FrozenBypass,
    collect_layers,
    model_targets,
    weight_shapes,
)
from weft.model.config import ModelConfig
from weft.model.decoder import attention_shape
from weft.model.kernels.select import choose_kernels
from weft.model.weights import RandomSource, build_weights
from weft.runtime.device_context import DeviceContext, create_context
from weft.runtime.kv_layout import kv_layout
from weft.runtime.torch_executor import TorchExecutor

NUM_ROWS = 64
CONTEXT = 256
CHUNK = 448
MAX_LEN = 1024
SPEED_TARGET = 0.7
STEP_TARGET = 1 / 1.25
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_STREAM_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """A batch's adapters: which specification each row has; None is the bare model."""

    name: str
    specs: tuple[AdapterSpec | None, ...]
    is_shared: bool = False
    """Rows of equal specifications share one adapter."""
    chunk: int = 0
    """Tokens of a prompt beside the decodes, with the last row's specification."""


def mixes() -> list[Mix]:
    """The mix of the first claim, then the others."""
    ranks = (4, 8, 16, 32)
    spread = tuple(AdapterSpec(rank=ranks[row % 4], target_modules=QKVO) for row in range(NUM_ROWS))
    everywhere = AdapterSpec(rank=16)
    ia3 = AdapterSpec(kind=AdapterKind.IA3, target_modules=("k_proj", "v_proj", "down_proj"))
    bottleneck = AdapterSpec(kind=AdapterKind.BOTTLENECK, rank=16, target_modules=("mlp",))
    kinds = (None, everywhere, ia3, bottleneck)
    return [
        Mix(name="64 adapters, ranks 4 to 32 on q,k,v,o", specs=spread),
        Mix(name="64 adapters, rank 16 on all linears", specs=(everywhere,) * NUM_ROWS),
        Mix(name="32 adapters, ranks 4 to 32 on q,k,v,o, 32 bare rows", specs=_halved(spread)),
        Mix(
            name="one adapter of rank 64 on all linears",
            specs=(AdapterSpec(rank=64),) * NUM_ROWS,
            is_shared=True,
        ),
        Mix(
            name="8 adapters of rank 256 on q,k,v,o, 8 rows",
            specs=(AdapterSpec(rank=256, target_modules=QKVO),) * 8,
        ),
        Mix(name="one row, rank 8 on q,k,v,o", specs=spread[1:2]),
        Mix(name="64 (IA)³", specs=(ia3,) * NUM_ROWS),
        Mix(name="64 bottlenecks of width 16", specs=(bottleneck,) * NUM_ROWS),
        Mix(name="all kinds and bare rows", specs=tuple(kinds[r % 4] for r in range(NUM_ROWS))),
        Mix(name=f"63 adapters and a chunk of {CHUNK}", specs=spread, chunk=CHUNK),
    ]


def _halved(specs: Sequence[AdapterSpec | None]) -> tuple[AdapterSpec | None, ...]:
    return tuple(spec if row % 2 else None for row, spec in enumerate(specs))


def random_adapter(
    spec: AdapterSpec, config: ModelConfig, dtype: torch.dtype, seed: int
) -> AdapterWeights:
    """Small random weights."""
    generator = torch.Generator().manual_seed(seed)
    bypasses = [
        FrozenBypass(
            target=target,
            weights={
                name: torch.randn(shape, generator=generator).mul_(0.01).to(dtype)
                for name, shape in weight_shapes(target).items()
            },
            activation=spec.activation,
        )
        for target in model_targets(spec, config)
    ]
    return AdapterWeights(kind=spec.kind, layers=collect_layers(bypasses, config.num_layers))


def make_context(dtype: torch.dtype) -> DeviceContext:
    """The 110 M shape with random weights."""
    config = ModelConfig.from_dict(RAND110)
    kernels = choose_kernels(attention_shape(config), dtype, torch.device("cpu"))
    layout = kv_layout(config, dtype)
    return create_context(
        config,
        build_weights(config, RandomSource(seed=0, dtype=dtype), kernels.make_linear),
        kernels,
        layout,
        num_pages=1 + NUM_ROWS * layout.pages_for_sequence(CONTEXT + CHUNK, CHUNK),
        max_model_len=MAX_LEN,
    )


class Bench:
    """An executor, and batches of decodes at one context."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.context = make_context(dtype)
        self.executor = TorchExecutor(self.context, max_num_seqs=NUM_ROWS)
        self._dtype = dtype
        self._started = False
        self._versions = 0
        (group,) = self.context.layout.groups
        self._page_tokens = group.page_tokens
        per_row = -(-(CONTEXT + CHUNK) // self._page_tokens)
        pages = 1 + np.random.default_rng(0).permutation(NUM_ROWS * per_row)
        self._tables = pages.reshape(NUM_ROWS, per_row).astype(np.int32)

    def adapters(self, mix: Mix) -> tuple[np.ndarray, tuple[AdapterRef, ...], int]:
        """Register a mix's adapters: index of each row, references, bytes."""
        refs: dict[object, AdapterRef] = {}
        column = np.full(len(mix.specs), -1, np.int32)
        num_bytes = 0
        for row, spec in enumerate(mix.specs):
            if spec is None:
                continue
            key = "shared" if mix.is_shared else row
            if key not in refs:
                self._versions += 1
                refs[key] = AdapterRef(id="bench", version=self._versions)
                adapter = random_adapter(spec, self.context.config, self._dtype, self._versions)
                num_bytes += adapter.size_bytes
                self.executor.adapters.put(refs[key], adapter)
            column[row] = list(refs).index(key)
        return column, tuple(refs.values()), num_bytes

    def batch(self, mix: Mix, column: np.ndarray, refs: tuple[AdapterRef, ...]) -> Batch:
        """All rows decode their token at `CONTEXT`; the last is a chunk where the mix has one."""
        num_rows = len(mix.specs)
        counts = np.ones(num_rows, np.int32)
        if mix.chunk:
            counts[-1] = mix.chunk
        row_starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        rows = np.repeat(np.arange(num_rows), counts)
        positions = CONTEXT - 1 + np.arange(row_starts[-1]) - row_starts[:-1][rows]
        slots = self._tables[rows, positions // self._page_tokens].astype(np.int64)
        kinds = np.full(num_rows, SegmentKind.DECODE, np.uint8)
        kinds[-1:] = SegmentKind.PREFILL if mix.chunk else SegmentKind.DECODE
        layers = np.tile(np.array([0, self.context.config.num_layers], np.int16), (num_rows, 1))
        longest = int(positions.max()) + 1
        batch = Batch(
            batch_id=0,
            kinds=kinds,
            slots=np.arange(num_rows, dtype=np.int32),
            row_starts=row_starts,
            layers=layers,
            adapters=column,
            models=np.zeros(num_rows, np.uint8),
            token_ids=np.full(row_starts[-1], 7, np.int32),
            positions=positions.astype(np.int32),
            prefix_lens=(positions + 1).astype(np.int32),
            page_tables=(self._tables[:num_rows, : -(-longest // self._page_tokens)],),
            write_slots=(slots * self._page_tokens + positions % self._page_tokens,),
            sample_rows=np.arange(num_rows, dtype=np.int32),
            prompt_logprob_rows=np.empty(0, np.int32),
            adapter_refs=refs,
            starts=() if self._started else tuple(map(_start, range(NUM_ROWS))),
        )
        self._started = True
        return batch

    def step_s(self, batch: Batch, repeats: int) -> float:
        """Seconds of one iteration, the median of a few."""
        times: list[float] = []
        for _ in range(repeats):
            begin_s = time.perf_counter()
            self.executor.submit(batch)
            self.executor.collect()
            times.append(time.perf_counter() - begin_s)
        return float(np.median(times))


def _start(slot: int) -> SequenceStart:
    return SequenceStart(
        slot=slot,
        sequence_id=slot,
        token_ids=np.full(CONTEXT, 7, np.int32),
        num_prompt_tokens=CONTEXT,
        sampling=SamplingParams(temperature=0.0, max_tokens=None),
        seed=0,
    )


def bandwidth_bytes_per_s() -> float:
    """What a sum over a large tensor reads, the best of five."""
    data = torch.ones(_STREAM_BYTES // 4)
    best_s = min(_timed(lambda: data.sum()) for _ in range(5))
    return _STREAM_BYTES / best_s


def _timed(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def measure(dtype_name: str, rounds: int, repeats: int, bandwidth: float) -> list[Row]:
    """All mixes in one dtype."""
    bench = Bench(_DTYPES[dtype_name])
    rows: list[Row] = []
    for index, mix in enumerate(mixes()):
        column, refs, num_bytes = bench.adapters(mix)
        bare = bench.batch(mix, np.full(len(column), -1, np.int32), ())
        mixed = bench.batch(mix, column, refs)
        for batch in (bare, mixed):
            bench.step_s(batch, 2)  # compiles, fills caches
        base_s, step_s = [], []
        for _ in range(rounds):
            base_s.append(bench.step_s(bare, repeats))
            step_s.append(bench.step_s(mixed, repeats))
        for ref in refs:
            bench.executor.unload_adapter(ref)
        if index == 0:
            speeds = [[len(column) / s for s in times] for times in (step_s, base_s)]
            claim = f"{dtype_name}: {mix.name}: decode against the bare model's"
            rows.append(compare(claim, "tokens/s", *speeds, target=SPEED_TARGET))
        bound_ms = [1e3 * (s + num_bytes / bandwidth) for s in base_s]
        rows.append(
            compare(
                f"{dtype_name}: {mix.name}: step against base + adapter bytes / bandwidth",
                "ms",
                [1e3 * s for s in step_s],
                bound_ms,
                lower_is_better=True,
                target=STEP_TARGET,
            )
        )
    bench.executor.close()
    return rows


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="iterations of one round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = describe_machine()
    bandwidth = bandwidth_bytes_per_s()
    rows = [
        row
        for name in arguments.dtypes.split(",")
        for row in measure(name, arguments.rounds, arguments.repeats, bandwidth)
    ]
    title = f"adapters, 110 M shape, context {CONTEXT}, {bandwidth / 1e9:.1f} GB/s"
    print_rows(rows, title=title)
    if arguments.json is not None:
        write_json(arguments.json, rows, machine, bandwidth_bytes_per_s=bandwidth)


if __name__ == "__main__":
    main()
