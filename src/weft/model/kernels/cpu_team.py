"""Compiles kernels in memory and runs them on torch's own OpenMP thread team.

A second pool of threads would spin against torch's on the same cores and both would crawl, so the
launcher below asks the OpenMP runtime that torch has already loaded (`GOMP_parallel`, exported by
libgomp and by the Intel and LLVM runtimes) for the very team that torch's operators run on.

A launch runs a list of kernels, one after the other with a barrier between, in a single parallel
region: entering one costs a few microseconds, a barrier a fraction of one. `OpList` holds such a
list; a decode step of a small model is one launch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from weft.base.errors import WeftError
from weft.model.kernels.cpu_ir import Builder, Isa, Val, define_kernel

_log = logging.getLogger(__name__)

_OPENMP_LIBRARIES = ("libgomp", "libiomp5", "libomp")
_ENTRY_POINTS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

_MAX_KEPT_FLOATS = 1 << 20
"""The largest scratch that a thread keeps for its next call."""

# `launch(ops, num_ops, num_threads)`: each op is a pair (kernel, args). One thread needs no team.
_LAUNCHER_IR = """
define void @run_ops(ptr %ops, i64 %num_ops, i64 %thread, i64 %num_threads) {{
entry:
  %is_alone = icmp eq i64 %num_threads, 1
  br label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %joined ]
  %op = getelementptr {{ ptr, ptr }}, ptr %ops, i64 %index
  %kernel = load ptr, ptr %op
  %args_at = getelementptr {{ ptr, ptr }}, ptr %op, i64 0, i32 1
  %args = load ptr, ptr %args_at
  call void %kernel(ptr %args, i64 %thread, i64 %num_threads)
  %next = add i64 %index, 1
  %is_last = icmp sge i64 %next, %num_ops
  %needs_no_barrier = or i1 %is_last, %is_alone
  br i1 %needs_no_barrier, label %joined, label %barrier
barrier:
  call void inttoptr (i64 {GOMP_barrier} to ptr)()
  br label %joined
joined:
  br i1 %is_last, label %end, label %loop
end:
  ret void
}}

define void @member(ptr %job) {{
  %thread = call i32 inttoptr (i64 {omp_get_thread_num} to ptr)()
  %size = call i32 inttoptr (i64 {omp_get_num_threads} to ptr)()
  %thread_64 = zext i32 %thread to i64
  %size_64 = zext i32 %size to i64
  %ops = load ptr, ptr %job
  %num_ops_at = getelementptr i64, ptr %job, i64 1
  %num_ops = load i64, ptr %num_ops_at
  call void @run_ops(ptr %ops, i64 %num_ops, i64 %thread_64, i64 %size_64)
  ret void
}}

define void @launch_one(ptr %kernel, ptr %args, i64 %num_threads) {{
  %op = alloca {{ ptr, ptr }}
  store ptr %kernel, ptr %op
  %args_at = getelementptr {{ ptr, ptr }}, ptr %op, i64 0, i32 1
  store ptr %args, ptr %args_at
  call void @launch(ptr %op, i64 1, i64 %num_threads)
  ret void
}}

define void @launch(ptr %ops, i64 %num_ops, i64 %num_threads) {{
  %is_alone = icmp eq i64 %num_threads, 1
  br i1 %is_alone, label %alone, label %team
alone:
  call void @run_ops(ptr %ops, i64 %num_ops, i64 0, i64 1)
  ret void
team:
  %job = alloca {{ ptr, i64 }}
  store ptr %ops, ptr %job
  %num_ops_at = getelementptr i64, ptr %job, i64 1
  store i64 %num_ops, ptr %num_ops_at
  %team_size = trunc i64 %num_threads to i32
  call void inttoptr (i64 {GOMP_parallel} to ptr)(ptr @member, ptr %job, i32 %team_size, i32 0)
  ret void
}}
"""


class KernelsUnavailableError(WeftError, RuntimeError):
    """Native CPU kernels cannot run here; callers use the torch twins instead."""


def loaded_openmp(maps: str) -> list[str]:
    """Paths of the OpenMP runtimes named in the text of a /proc/PID/maps, torch's own first."""
    paths: dict[str, None] = {}
    for line in maps.splitlines():
        path = line[line.find("/") :] if "/" in line else ""
        if Path(path).name.startswith(_OPENMP_LIBRARIES):
            paths.setdefault(path)
    return sorted(paths, key=lambda path: "/torch" not in path)


def _openmp_entry_points() -> dict[str, int]:
    """Addresses of the runtime that torch uses, or {} where there is none to share."""
    if not torch.backends.openmp.is_available():
        return {}
    try:
        paths = loaded_openmp(Path("/proc/self/maps").read_text())
    except OSError:
        return {}
    # With two runtimes in the process we cannot tell whose team torch is on.
    if len(paths) > 1 and "/torch" not in paths[0]:
        return {}
    for path in paths[:1]:
        library = ctypes.CDLL(path)
        try:
            return {
                name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                for name in _ENTRY_POINTS
            }
        except AttributeError:
            return {}
    return {}


class CompiledModule:
    """Machine code of one LLVM module; keep it alive as long as an address of it is in use."""

    __slots__ = ("_engine",)

    def __init__(self, text: str) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(),
            features=llvm.get_host_cpu_features().flatten(),
            opt=3,
            codemodel="jitdefault",
        )
        module = llvm.parse_assembly(text)
        module.triple = llvm.get_process_triple()
        module.data_layout = str(machine.target_data)
        tuning = llvm.create_pipeline_tuning_options(speed_level=2)
        # The kernels are vectors already; unrolling them again only costs compile time.
        tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
        passes = llvm.create_pass_builder(machine, tuning)
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Where the function `name` starts."""
        return self._engine.get_function_address(name)


def float_bits(value: float) -> int:
    """A float32 in the low half of an argument word."""
    return struct.unpack("I", struct.pack("f", value))[0]


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One kernel with its int64 argument words, and the tensors that these point into."""

    kernel: int
    words: tuple[int, ...]
    rows_word: int
    """Which word counts the rows of work."""
    keep: tuple[Tensor | None, ...]
    only_for: range | None = None
    """The numbers of rows for which a replay runs it; None: every number."""


class OpList:
    """Calls that run one after the other in one parallel region, with a barrier after each.

    It holds on to the tensors of its calls, which are read and written in place: to run the same
    work on new data, fill the same tensors and run it again.
    """

    __slots__ = ("_calls", "_num_rows", "_packed", "_scratch", "_team", "_words")

    def __init__(self, team: Team) -> None:
        self._team = team
        self._calls: list[Call] = []
        self._words: list[ctypes.Array[ctypes.c_int64]] = []
        self._packed: bytes | None = None
        self._scratch: dict[str, Tensor] = {}
        self._num_rows: int | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> None:
        """Append one call."""
        self._calls.append(call)
        self._words.append((ctypes.c_int64 * len(call.words))(*call.words))
        self._packed = None

    def scratch(self, purpose: str, count: int) -> Tensor:
        """Room for `count` float32 that calls of one purpose take turns to use."""
        return _grown(self._scratch, purpose, count)

    def set_num_rows(self, num_rows: int) -> None:
        """Let every call work on its first `num_rows` rows only."""
        if num_rows != self._num_rows:
            for call, words in zip(self._calls, self._words, strict=True):
                words[call.rows_word] = num_rows
            self._num_rows = num_rows
            self._packed = None

    def run(self) -> None:
        """Run it; returns when the last kernel has ended.

        Before `set_num_rows` has been called, every call runs as it was added.
        """
        if self._packed is None:
            self._packed = b"".join(
                struct.pack("2q", call.kernel, ctypes.addressof(words))
                for call, words in zip(self._calls, self._words, strict=True)
                if call.only_for is None
                or self._num_rows is None
                or self._num_rows in call.only_for
            )
        if self._packed:
            self._team.launch(self._packed, len(self._packed) // 16)


def _grown(rooms: dict[str, Tensor], purpose: str, count: int) -> Tensor:
    """The room for a purpose, made anew where it is too small."""
    room = rooms.get(purpose)
    if room is None or room.numel() < count:
        room = rooms[purpose] = torch.empty(count, dtype=torch.float32)
    return room


class Team:
    """Runs compiled kernels on torch's threads."""

    def __init__(self, openmp: dict[str, int]) -> None:
        filled = {name: openmp.get(name, 0) for name in _ENTRY_POINTS}
        self._code = CompiledModule(_LAUNCHER_IR.format(**filled))
        self._is_shared = bool(openmp)
        entry = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
        self._launch = entry(self._code.address("launch"))
        one = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)
        self._launch_one = one(self._code.address("launch_one"))
        self._local = threading.local()

    @property
    def num_threads(self) -> int:
        """Threads that a launch uses: torch's own number, or 1 where its team is out of reach."""
        return torch.get_num_threads() if self._is_shared else 1

    @property
    def is_recording(self) -> bool:
        """Whether this thread is inside `recording`."""
        return getattr(self._local, "record", None) is not None

    def scratch(self, purpose: str, count: int) -> Tensor:
        """Room for `count` float32 until the calls submitted next have ended.

        Calls of one purpose share it: those of a recording, and those of this thread one after the
        other. Fresh memory would cost a page fault every 4 KiB, as much as a small product itself.
        """
        record: OpList | None = getattr(self._local, "record", None)
        if record is not None:
            return record.scratch(purpose, count)
        if count > _MAX_KEPT_FLOATS:
            return torch.empty(count, dtype=torch.float32)
        rooms: dict[str, Tensor] | None = getattr(self._local, "rooms", None)
        if rooms is None:
            rooms = self._local.rooms = {}
        return _grown(rooms, purpose, count)

    def submit(self, *calls: Call) -> None:
        """Run calls in order; inside `recording` on this thread, append them instead."""
        record: OpList | None = getattr(self._local, "record", None)
        if record is None and len(calls) == 1:
            words = calls[0].words
            packed = struct.pack(f"{len(words)}q", *words)
            self._launch_one(calls[0].kernel, packed, self.num_threads)
            return
        if record is not None:
            for call in calls:
                record.add(call)
            return
        words = [word for call in calls for word in call.words]
        room = (ctypes.c_int64 * len(words))(*words)
        at = ctypes.addressof(room)
        ops: list[int] = []
        for call in calls:
            ops += (call.kernel, at)
            at += 8 * len(call.words)
        self.launch(struct.pack(f"{len(ops)}q", *ops), len(calls))

    @contextmanager
    def recording(self) -> Iterator[OpList]:
        """Collect what this thread submits, without running it."""
        self._local.record = OpList(self)
        try:
            yield self._local.record
        finally:
            self._local.record = None

    def launch(self, packed: bytes, num_ops: int) -> None:
        """Run packed pairs (kernel address, address of its words)."""
        self._launch(packed, num_ops, self.num_threads)


class KernelSpec(Protocol):
    """Names one variant of a kernel and writes its code; hashable, equal where the code is."""

    @property
    def name(self) -> str:
        """A C identifier."""
        ...

    @property
    def variants(self) -> Sequence[KernelSpec]:
        """This kernel and those that the same model needs sooner or later: compiled together, so
        that no later request waits for it."""
        ...

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body; what the words at `args` mean is between the kernel and its callers."""
        ...


class NativeKernels:
    """The kernels compiled so far, and the team that runs them."""

    def __init__(self, team: Team, isa: Isa) -> None:
        self.team = team
        self.isa = isa
        self._addresses: dict[KernelSpec, int] = {}
        self._modules: list[CompiledModule] = []
        self._lock = threading.Lock()

    def address(self, spec: KernelSpec) -> int:
        """The address of a kernel, compiled on first use (some tenths of a second)."""
        known = self._addresses.get(spec)
        if known is not None:
            return known
        with self._lock:
            if spec not in self._addresses:
                module = ir.Module(spec.name)
                for variant in spec.variants:
                    define_kernel(module, variant.name, self.isa, variant.emit)
                compiled = CompiledModule(str(module))
                self._modules.append(compiled)
                for variant in spec.variants:
                    self._addresses[variant] = compiled.address(variant.name)
            return self._addresses[spec]


@functools.cache
def native_kernels() -> NativeKernels | None:
    """This process's kernels, or None (with one warning) where they cannot run."""
    try:
        isa = Isa.detect()
        if isa.lanes < 8:
            raise KernelsUnavailableError("the processor has neither AVX2 nor AVX-512")
        openmp = _openmp_entry_points()
        if not openmp and torch.get_num_threads() > 1:
            raise KernelsUnavailableError("torch's OpenMP runtime was not found to share threads")
        return NativeKernels(Team(openmp), isa)
    except (OSError, RuntimeError, ValueError) as error:
        _log.warning("native CPU kernels are off (%s); plain torch runs instead", error)
        return None
