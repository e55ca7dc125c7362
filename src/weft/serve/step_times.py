"""Where a server's step times come from: a file, what an earlier start measured, or a sweep now.

A sweep of a few seconds is kept in the user's cache directory under a name that says all that it
depends on, so that only the first start of a model pays for it. What serving then teaches is kept
beside it, in a file of its own: the sweep stays as it was measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.base.errors import ConfigError
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.online_step_time import REFIT_PARTS, StepRefit

logger = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
_REFIT_FORMAT = "weft-step-refit"
_REFIT_VERSION = 1
_REFIT_SUFFIX = ".refit.json"


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
    path = _path(key, directory)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitFile:
    """What serving taught about one sweep; a file that cannot be read or written harms nobody."""

    path: Path
    base: StepTimeProfile
    """The sweep: another one makes a refit worthless."""

    @classmethod
    def beside(
        cls, base: StepTimeProfile, *, key: Mapping[str, object], directory: Path | None = None
    ) -> RefitFile:
        """That of the sweep that `find_step_times` keeps under a key."""
        return cls(path=_path(key, directory).with_suffix(_REFIT_SUFFIX), base=base)

    def read(self) -> StepRefit | None:
        """What was kept; None where nothing was, or nothing of this sweep."""
        try:
            data: Any = json.loads(self.path.read_text(encoding="utf-8"))
            kind = (data["format"], data["version"], data["base"])
            if kind != (_REFIT_FORMAT, _REFIT_VERSION, self._base_digest):
                return None
            return StepRefit(
                factors=tuple(float(data["factors"][part]) for part in REFIT_PARTS),
                residual=float(data["residual"]),
                num_observed=int(data["num_observed"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("what serving taught is forgotten: %s: %s", self.path, error)
            return None

    def write(self, refit: StepRefit) -> None:
        """Keep it; the file is whole or the one before."""
        data = {
            "format": _REFIT_FORMAT,
            "version": _REFIT_VERSION,
            "base": self._base_digest,
            "factors": dict(zip(REFIT_PARTS, refit.factors, strict=True)),
            "residual": refit.residual,
            "num_observed": refit.num_observed,
        }
        partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        try:
            partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            logger.warning("what serving taught is not kept: %s", error)

    @property
    def _base_digest(self) -> str:
        return hashlib.sha256(self.base.to_json().encode()).hexdigest()


def kept_refits(base: StepTimeProfile, directory: Path | None = None) -> list[RefitFile]:
    """Those of all sweeps of the model, type and device that a profile is of."""
    found: list[RefitFile] = []
    for path in sorted((directory or cache_directory()).glob(f"*{_REFIT_SUFFIX}")):
        sweep = path.with_name(path.name.removesuffix(_REFIT_SUFFIX) + ".json")
        try:
            other = StepTimeProfile.read(sweep)
        except ConfigError:
            continue
        if (other.model, other.dtype, other.device) == (base.model, base.dtype, base.device):
            found.append(RefitFile(path=path, base=other))
    return found


def _path(key: Mapping[str, object], directory: Path | None) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
    return (directory or cache_directory()) / f"{digest}.json"
