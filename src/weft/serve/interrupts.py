"""Ctrl-C between iterations instead of within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Hold SIGINT back while inside; yields what raises KeyboardInterrupt if one came.

    An interrupt in the midst of an iteration would leave pages and sequences half changed. One
    that comes last is raised on the way out. Other threads than the main one get no signals, and
    a handler of the caller's own is left alone: it does not raise in the midst of anything.
    """
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not is_ours:
        yield lambda: None
        return
    came = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    def raise_if_interrupted() -> None:
        nonlocal came
        if came:
            came = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_if_interrupted()
