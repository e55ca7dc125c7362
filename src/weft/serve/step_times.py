"""Where a server's step times come from: a file, what an earlier start measured, or a sweep now.

A sweep of a few seconds is kept in the user's cache directory under a name that says all that it
depends on, so that only the first start of a model pays for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from weft.base.errors import ConfigError
from weft.cost.fitted_step_time import StepTimeProfile

logger = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/weft/step-times`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "weft" / "step-times"


def find_step_times(
    source: str,
    *,
    key: Mapping[str, object],
    measure: Callable[[], StepTimeProfile],
    directory: Path | None = None,
) -> StepTimeProfile | None:
    """The step times of an executor; None for `off`.

    `source` is `auto`, `off` or a file that `weft profile` wrote. `key` holds all that a sweep's
    result depends on; `measure` makes it. A cache that cannot be read or written is no failure.

    Raises:
        ConfigError: a file was named and cannot be read.
    """
    if source == OFF:
        return None
    if source != AUTO:
        return StepTimeProfile.read(source)
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
    path = (directory or cache_directory()) / f"{digest}.json"
    if path.exists():
        try:
            return StepTimeProfile.read(path)
        except ConfigError as error:
            logger.warning("measuring step times again: %s", error)
    profile = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.write(path)
    except OSError as error:
        logger.warning("step times are not kept: %s", error)
    return profile
