"""Freed memory stays with the process, unless its environment says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from weft.runtime.heap import keep_freed_memory
print(keep_freed_memory())
def work():
    held = [torch.zeros(2**21) for _ in range(4)]  # 8 MiB each
for _ in range(6):  # The heap grows until every tensor has found its place.
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize("is_set", [False, True])
def test_memory_freed_by_a_step_is_not_paged_in_again(is_set: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if is_set:
        environment["MALLOC_TRIM_THRESHOLD_"] = "131072"
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    said, num_faults = done.stdout.split()
    if is_set:
        assert said == "False"
        assert int(num_faults) > 1000
    else:
        assert said == "True"
        assert int(num_faults) < 1000
