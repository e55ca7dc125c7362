"""One root for every error that Weft raises on purpose.

Each subclass also inherits the standard type that it refines, so that `except ValueError` works as
a caller expects. A message says what was wrong, the value, the limit, and what to do. All of them
pickle, because they cross process borders.
"""

from __future__ import annotations


class WeftError(Exception):
    """Root of the errors that Weft raises on purpose."""


class InvalidRequestError(WeftError, ValueError):
    """A request that cannot be served as written; `param` names the offending field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class ConfigError(WeftError, ValueError):
    """A setting of ours (engine, cluster, plan, command line) that is out of its range."""


class GraphError(WeftError, ValueError):
    """A computation graph that no planner could use; the message names the operator."""


class UnsupportedError(WeftError, NotImplementedError):
    """Something valid that Weft does not do; the message lists what it does."""


class ModelLoadError(WeftError, ValueError):
    """A model directory that is missing, half-written or inconsistent with its configuration."""


class AdapterLoadError(WeftError, ValueError):
    """An adapter that is missing, half-written, or made for another model."""


class OutOfMemoryError(WeftError, MemoryError):
    """Memory too small for the smallest useful unit; the message holds the number that would do."""


class EngineDeadError(WeftError, RuntimeError):
    """The engine process is gone; no request can be answered any more."""


class QueueFullError(WeftError, RuntimeError):
    """The bounded waiting queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class IntegrityError(WeftError, AssertionError):
    """An internal invariant is broken: a bug in Weft, never the user's fault."""
