"""What this machine can do at most: read bandwidth and GEMM rate, with as many threads as ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from protocol import serve

READ_BYTES = 512 * 2**20
"""Many times any last-level cache, so that memory is what is measured."""
GEMM_SIZE = 2048


class MachineLimits:
    """Measures limits in the same rotation as the engines; it holds no model."""

    def load(self, spec: dict[str, Any]) -> dict[str, str]:
        torch.set_num_threads(spec["num_threads"])
        torch.set_grad_enabled(False)
        self._memory = torch.ones(READ_BYTES // 4)
        return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}

    def read_bandwidth(self) -> dict[str, float]:
        """Bytes/s of the best of three ways to read 512 MiB once: a sum and two GEMV."""
        wide = self._memory.view(-1, 4096)
        narrow = self._memory.view(torch.bfloat16).view(-1, 4096)
        vector, half = torch.ones(4096), torch.ones(4096, dtype=torch.bfloat16)
        readers: dict[str, Callable[[], object]] = {
            "sum": self._memory.sum,
            "gemv_float32": lambda: torch.mv(wide, vector),
            "gemv_bfloat16": lambda: torch.mv(narrow, half),
        }
        return {name: READ_BYTES / _best_s(reader, 3) for name, reader in readers.items()}

    def gemm_rate(self, dtype: str) -> float:
        """FLOP/s of a square matrix product of size 2048 in `dtype`."""
        kind = getattr(torch, dtype)
        left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(kind) for _ in range(2))
        return 2.0 * GEMM_SIZE**3 / _best_s(lambda: torch.mm(left, right), 3)

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        raise NotImplementedError("the machine holds no model")


def _best_s(work: Callable[[], object], num_runs: int) -> float:
    work()
    walls: list[float] = []
    for _ in range(num_runs):
        started_s = time.perf_counter()
        work()
        walls.append(time.perf_counter() - started_s)
    return min(walls)


if __name__ == "__main__":
    serve(MachineLimits())
