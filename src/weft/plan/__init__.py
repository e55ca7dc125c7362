"""Offline decisions: plans, schedules, actions; one file per planning method. No torch.

The package is callable: `weft.plan(graph, cluster, batch_size=...)` is `weft.plan.api.plan`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A module that plans when it is called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # Imported on the first call, so that reading a plan's nouns loads no planner.
        return import_module("weft.plan.api").plan(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
