"""Ranks that end themselves by SIGKILL in the middle of a named action; imported by the ranks.

`WEFT_TEST_KILLS` names a directory with `kills.json`, a list of {kind, rank, step}: entry n is for
the n-th attempt that torchrun makes. A rank notes its end in `deaths.jsonl` first, so that a test
can assert that it was there. Rank 0's rows of each attempt are kept in `attempt-N.jsonl`.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from train.small import data, model
from weft.runtime.dist_transport import DistTransport
from weft.runtime.stage_module import StageModule
from weft.train import checkpoint
from weft.train.checkpoint import CheckpointStore
from weft.train.checkpoint_writer import StreamingWriter
from weft.train.run_dir import RunDirectory

__all__ = ["data", "model"]

KINDS = ("F", "B", "all-reduce", "save", "publish")
"""Forward, backward, a sum over ranks, files of a save, and right before a save gets its name."""


class Killer:
    """Watches for the moment that this attempt's entry names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        kills = json.loads((directory / "kills.json").read_text())
        mine = kills[self.attempt] if self.attempt < len(kills) else {}
        is_me = mine.get("rank") == int(os.environ["RANK"])
        self.kind: str = mine["kind"] if is_me else ""
        self.from_step: int = mine.get("step", 0)
        self.step = -1
        self.saved_step = -1
        self.checkpoints = directory / "run" / "checkpoints"

    def end_in(self, kind: str, step: int) -> None:
        """End the process if this is the moment."""
        if kind != self.kind or step < self.from_step:
            return
        whole = [int(path.name[5:]) for path in self.checkpoints.glob("step-????????")]
        row = {"kind": kind, "step": step, "newest": max(whole, default=0), "attempt": self.attempt}
        with (self.directory / "deaths.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Wrap what a rank does; nothing of it is changed but its end."""
        killer = self
        forward, all_reduce = StageModule.forward, DistTransport.all_reduce
        write_data, publish = StreamingWriter.write_data, checkpoint.publish_directory
        save, add_metrics = CheckpointStore.save, RunDirectory.add_metrics

        def in_forward(module: Any, call: Any, *arguments: Any) -> Any:
            values = forward(module, call, *arguments)
            if call.training:
                killer.step = call.step
                killer.end_in("F", call.step)
                for value in values:
                    if isinstance(value, Tensor) and value.requires_grad:
                        value.register_hook(lambda _: killer.end_in("B", call.step))
            return values

        def in_all_reduce(transport: Any, *arguments: Any) -> Any:
            handle = all_reduce(transport, *arguments)
            killer.end_in("all-reduce", killer.step)
            return handle

        def in_save(store: Any, ranks: Any, state: Any, **options: Any) -> None:
            killer.saved_step = state.num_steps
            save(store, ranks, state, **options)

        def in_write(writer: Any, *arguments: Any) -> Any:
            found = write_data(writer, *arguments)
            killer.end_in("save", killer.saved_step)
            return found

        def in_publish(*arguments: Any) -> None:
            killer.end_in("publish", killer.saved_step)
            publish(*arguments)

        def in_metrics(run_dir: Any, row: Any) -> None:
            add_metrics(run_dir, row)
            with (killer.directory / f"attempt-{killer.attempt}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

        StageModule.forward = in_forward  # type: ignore[method-assign]
        DistTransport.all_reduce = in_all_reduce  # type: ignore[method-assign]
        CheckpointStore.save = in_save  # type: ignore[method-assign]
        StreamingWriter.write_data = in_write  # type: ignore[method-assign]
        checkpoint.publish_directory = in_publish
        RunDirectory.add_metrics = in_metrics  # type: ignore[method-assign]


if "WEFT_TEST_KILLS" in os.environ and "RANK" in os.environ:
    Killer(Path(os.environ["WEFT_TEST_KILLS"])).install()
