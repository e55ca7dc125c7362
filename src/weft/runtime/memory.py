"""How much memory is free on a device, and how it is said to people."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that could be allocated now; on the CPU, within the limit of the control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    found = [_meminfo_available(), _cgroup_free()]
    return min((value for value in found if value is not None), default=1 << 30)


def most_memory_bytes(device: torch.device) -> int:
    """Bytes that one allocation could ever get: what a larger wish has to be refused by.

    Unlike `free_memory_bytes` it counts what a control group's page cache or torch's own allocator
    hold, since both give it back when asked.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_meminfo_available(), _cgroup_limit()]
    return min((value for value in found if value is not None), default=1 << 62)


def format_bytes(size: float) -> str:
    """A size for people: 1.5 GiB, 320 MiB, 12 KiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} bytes"


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = os.sysconf_names
        if "SC_AVPHYS_PAGES" in names:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if "SC_PHYS_PAGES" in names:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_limit() -> int | None:
    try:
        return int((_CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _cgroup_free() -> int | None:
    limit = _cgroup_limit()
    try:
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if limit is None else max(0, limit - used)
