"""Tokens per second and time to first token on this CPU: ours and its peers, in turns.

Every engine is loaded once in its own process and stopped (SIGSTOP) unless it is its turn, so that
only one computes. In each round every engine gets the same fresh random prompts, and the order
rotates. A ratio compares two engines within one round; a row shows its median, lowest and highest
over the rounds. The machine's own read bandwidth and GEMM rate are measured in the same rotation.

    python benchmarks/serve_cpu.py --rounds 5 --json serve_cpu.json
    python benchmarks/serve_cpu.py --quick --peers transformers --models embedded
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from agreement import Agreement, check_agreement
from bench_models import BenchModel, open_model
from peers.client import Worker, WorkerError
from peers.contention import num_cores_of_others, read_cpu
from peers.roster import (
    ENGINES,
    MACHINE_ENGINE,
    OURS,
    Engine,
    engine_spec,
    find_interpreter,
    worker_environment,
)
from rows import Row, describe_machine, print_rows, write_json
from serve_rows import Measured, model_rows, print_figures
from workloads import Kind, Workload, draw_prompts, standard_workloads


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """An engine loaded at one dtype."""

    engine: Engine
    dtype: str
    worker: Worker

    @property
    def name(self) -> str:
        return f"{self.engine.name} {self.dtype}"


def main() -> None:
    # A polite kill must still end the workers, which may be stopped and so deaf to it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options = parse_options()
    report = Report(options)
    for name in options.models:
        model = open_model(name, options.cache, options.embedded_model)
        sitting = Sitting(model, options)
        try:
            sitting.load()
            report.agreements += check_agreement(model, sitting.workers_by_name())
            sitting.run()
        finally:
            # What was measured is shown even when the sitting is cut short.
            sitting.close()
            report.add(sitting)
    report.close()


class Report:
    """Prints as models are done, and rewrites the JSON file each time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._rows: list[Row] = []
        self._raw: dict[str, object] = {}
        self._skipped: list[str] = []
        self._versions: dict[str, str] = {}
        self.agreements: list[Agreement] = []
        self._machine = describe_machine()
        for name, value in self._machine.items():
            print(f"{name:10} {value}")

    def add(self, sitting: Sitting) -> None:
        """One model's figures and ratios."""
        name = sitting.model.name
        self._skipped += sitting.skipped
        self._raw[name] = sitting.measured.as_plain()
        self._versions |= sitting.versions
        threads = self._options.threads
        print_figures(sitting.measured, title=f"{name}: medians, {threads} threads")
        rows = model_rows(sitting.model, sitting.measured, sitting.workloads)
        self._rows += rows
        if rows:
            print_rows(rows, title=f"{name}: ratios (above 1 is in our favour)")
        self._save()

    def close(self) -> None:
        """What concerns all models."""
        for engine, version in self._versions.items():
            print(f"version: {engine}: {version}")
        for agreement in self.agreements:
            print(agreement.describe())
        for line in self._skipped:
            print(f"skipped: {line}")

    def _save(self) -> None:
        if self._options.json is None:
            return
        write_json(
            self._options.json,
            self._rows,
            self._machine,
            versions=self._versions,
            raw=self._raw,
            skipped=self._skipped,
            agreement=[agreement.describe() for agreement in self.agreements],
        )


class Sitting:
    """All engines of one model in memory at once, measured in rotation."""

    def __init__(self, model: BenchModel, options: argparse.Namespace) -> None:
        self.model = model
        self.options = options
        self.workloads = standard_workloads(
            batches=options.batches,
            kinds=options.workloads,
            max_len=model.config["max_position_embeddings"],
            quick=options.quick,
        )
        self.skipped: list[str] = []
        self.measured = Measured()
        self.versions: dict[str, str] = {}
        self.entrants: list[Entrant] = []
        self._machine: Worker | None = None

    def load(self) -> None:
        """Start, load and warm every engine that can be; name the others and why."""
        wanted = [engine for engine in ENGINES if engine.name in (OURS, *self.options.peers)]
        if self.options.without_ours:
            wanted = [engine for engine in wanted if engine.name != OURS]
        for engine in wanted:
            for dtype in self.options.dtypes:
                if dtype not in engine.dtypes:
                    self._skip(f"{engine.name} {dtype}", engine.no_dtype_reason)
                    continue
                try:
                    self._load_one(engine, dtype)
                except (LookupError, RuntimeError) as error:
                    self._skip(f"{engine.name} {dtype}", str(error))
        self._machine = self._start(MACHINE_ENGINE, sys.executable, "machine")
        self._machine.load({"num_threads": self.options.threads})

    def workers_by_name(self) -> dict[tuple[str, str], Worker]:
        """(engine, dtype) -> worker, for the check of equal tokens."""
        return {(entrant.engine.name, entrant.dtype): entrant.worker for entrant in self.entrants}

    def run(self) -> None:
        """Every round: the machine's limits, then each workload by each engine in rotation."""
        deadline_s = time.monotonic() + self.options.time_limit_s
        for round_index in range(self.options.rounds):
            if round_index and time.monotonic() > deadline_s:
                self._skip(f"rounds from {round_index + 1} on", "--time-limit-s has passed")
                break
            self._measure_machine(round_index)
            for workload in self.workloads:
                turns = [entrant for entrant in self.entrants if workload.admits(entrant.engine)]
                first = round_index % len(turns) if turns else 0
                for entrant in turns[first:] + turns[:first]:
                    self._measure(entrant, workload, round_index)

    def close(self) -> None:
        """End every worker."""
        for entrant in self.entrants:
            entrant.worker.close()
        if self._machine is not None:
            self._machine.close()

    def _start(self, engine: Engine, interpreter: str, label: str) -> Worker:
        return Worker(
            module=engine.module,
            interpreter=interpreter,
            environment=worker_environment(engine, interpreter, self.options.threads),
            log=self.options.cache / "logs" / f"{self.model.name}-{label}.log",
        )

    def _load_one(self, engine: Engine, dtype: str) -> None:
        interpreter = find_interpreter(engine, self.options.peer)
        spec = engine_spec(
            engine,
            self.model,
            dtype,
            interpreter=interpreter,
            num_threads=self.options.threads,
            max_num_seqs=max(workload.batch for workload in self.workloads),
            cache=self.options.cache,
        )
        worker = self._start(engine, interpreter, f"{engine.name}-{dtype}")
        entrant = Entrant(engine=engine, dtype=dtype, worker=worker)
        try:
            notes = worker.load(spec)
            for workload in self.workloads:
                if workload.admits(engine):
                    worker.generate(*draw_prompts(workload.shortened(), self.model.config, -1, 0))
        except WorkerError:
            worker.close()
            raise
        self.entrants.append(entrant)
        self.versions[engine.name] = ", ".join(f"{name} {text}" for name, text in notes.items())
        log(f"{self.model.name}: {entrant.name} ready: {self.versions[engine.name]}")

    def _measure(self, entrant: Entrant, workload: Workload, round_index: int) -> None:
        if entrant not in self.entrants:
            return
        values: list[float] = []
        before = read_cpu(entrant.worker.session)
        try:
            for repeat in range(workload.num_repeats):
                prompts, counts = draw_prompts(workload, self.model.config, round_index, repeat)
                generation = entrant.worker.generate(prompts, counts)
                wall_s = generation.wall_s
                timed = workload.kind in (Kind.TTFT, Kind.PREFILL)
                values.append(wall_s if timed else generation.num_tokens / wall_s)
        except WorkerError as error:
            self._skip(entrant.name, f"left at {workload.name}: {error}")
            entrant.worker.close()
            self.entrants.remove(entrant)
            return
        after = read_cpu(entrant.worker.session)
        others = num_cores_of_others(before, after) if before and after else 0.0
        self.measured.cores_of_others.append(others)
        value = statistics.median(values)
        key = (entrant.engine.name, entrant.dtype, workload.name)
        self.measured.values[key][round_index] = value
        log(
            f"{self.model.name} round {round_index} {workload.name}: {entrant.name} {value:.4g} "
            f"(others used {others:.2f} cores)"
        )

    def _measure_machine(self, round_index: int) -> None:
        if self._machine is None:
            return
        ways: dict[str, float] = self._machine.call("read_bandwidth")
        self.measured.read_bytes_per_s[round_index] = max(ways.values())
        for dtype in self.options.dtypes:
            rate: float = self._machine.call("gemm_rate", dtype=dtype)
            self.measured.gemm_flop_per_s[dtype][round_index] = rate
        log(f"{self.model.name} round {round_index} machine: {ways}")

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{self.model.name}: {name}: {reason}")
        log(f"skipped {self.skipped[-1]}")


def log(line: str) -> None:
    """Progress, kept apart from the tables."""
    print(line, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    """The command line; names are checked against what exists."""
    names = [engine.name for engine in ENGINES if engine.name != OURS]
    peers = [name for name in names if not name.startswith(OURS)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=_names, default=["embedded", "rand110"])
    parser.add_argument("--dtypes", type=_names, default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=_counts, default=[1, 8, 32])
    parser.add_argument("--workloads", type=_names, default=[str(kind) for kind in Kind])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--time-limit-s", type=float, default=3600.0, help="no round of a model begins after this"
    )
    parser.add_argument("--peers", type=_names, default=peers, help="also: weft-nocompiler")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's interpreter"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--embedded-model", type=Path, help="a directory instead of the packaged")
    parser.add_argument("--cache", type=Path, default=Path(".bench"))
    parser.add_argument("--without-ours", action="store_true", help="only the peers")
    parser.add_argument("--quick", action="store_true", help="32 + 16 tokens, one round: a check")
    parser.add_argument("--json", type=Path, help="file, or - for stdout")
    options = parser.parse_args()
    options.cache = options.cache.resolve()
    options.peer = dict(pair.split("=", 1) for pair in options.peer)
    for given, known in (
        (options.models, ["embedded", "rand110"]),
        (options.dtypes, ["float32", "bfloat16"]),
        (options.workloads, [str(kind) for kind in Kind]),
        (options.peers, names),
        (options.peer, names),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    if options.quick:
        options.rounds = 1
    return options


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
