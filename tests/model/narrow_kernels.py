"""Native kernels as a processor with narrower vectors would have them."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from weft.model.kernels.cpu_team import NativeKernels, native_kernels


@functools.cache
def kernels(lanes: int, has_dot: bool) -> NativeKernels:
    """The host's kernels, or such as a narrower processor would have."""
    full = native_kernels()
    assert full is not None
    if lanes > full.isa.lanes or has_dot > full.isa.has_bf16_dot:
        pytest.skip("the host lacks these vectors or instructions")
    if (lanes, has_dot) == (full.isa.lanes, full.isa.has_bf16_dot):
        return full
    isa = dataclasses.replace(full.isa, lanes=lanes, has_bf16_dot=has_dot)
    return NativeKernels(full.team, isa)
