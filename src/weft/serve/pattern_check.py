"""A tenant's regular expressions, tried in a process of their own before the engine meets them.

Python's `re` goes back over what it has matched, for some patterns longer than anyone can wait, and
holds the whole process while it does: the engine and the answers of all others.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence

from weft.base.errors import InvalidRequestError
from weft.graph.adapter_spec import AdapterSpec, Module, module_name

_MOST_LAYERS = 256
_LIMIT_S = 0.05
"""CPU seconds for one pattern on every module of so many layers; a plain one takes 2 ms."""
_TRY = """
import json, re, signal, sys
patterns, names, limit_s = json.load(sys.stdin)
for pattern in patterns:
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)  # Its end ends the process.
    for name in names:
        re.fullmatch(pattern, name)
"""


async def check_patterns(spec: AdapterSpec) -> None:
    """Refuse an adapter whose patterns take too long to match.

    Raises:
        InvalidRequestError: one does.
    """
    given = (spec.target_modules, spec.exclude_modules, spec.feedforward_modules)
    patterns = [text for text in given if isinstance(text, str) and text not in ("", "all-linear")]
    if patterns and not await _end_in_time(patterns):
        raise InvalidRequestError(
            f"the pattern {patterns[0]!r} takes too long to match; repeat nothing within a "
            "repetition, or list the modules",
            "weft",
        )


async def _end_in_time(patterns: Sequence[str]) -> bool:
    names = [module_name(layer, module) for layer in range(_MOST_LAYERS) for module in Module]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _TRY),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await process.communicate(json.dumps([patterns, names, _LIMIT_S]).encode())
    return process.returncode != -signal.SIGVTALRM
