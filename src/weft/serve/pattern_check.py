"""A tenant's regular expressions, tried in a process of their own before the engine meets them.

Python's `re` goes back over what it has matched, for some patterns longer than anyone can wait, and
holds the whole process while it does: the engine and the answers of all others.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.base.errors import InvalidRequestError
from weft.graph.adapter_spec import KEY_PATTERN, AdapterSpec, Module, module_name

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
    print(end=".", flush=True)
"""
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")
_KEYS = ("rank_pattern", "alpha_pattern")
_CONFIGS = ("bottleneck.json", "adapter_config.json")


async def check_patterns(spec: AdapterSpec) -> None:
    """Refuse an adapter whose patterns take too long to match.

    Raises:
        InvalidRequestError: one does.
    """
    await _check({name: getattr(spec, name) for name in (*_WHOLE, *_KEYS)}, "weft")


async def check_directory_patterns(directory: Path) -> None:
    """Refuse an adapter directory whose patterns take too long to match.

    Whatever else is wrong with it, the engine says.

    Raises:
        InvalidRequestError: one does.
    """
    for path in (directory / name for name in _CONFIGS):
        try:
            raw = json.loads(path.read_bytes()) if path.is_file() else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(raw, dict):
            await _check(raw, "lora_path")


async def _check(fields: Mapping[str, Any], param: str) -> None:
    given = [fields.get(name) for name in _WHOLE]
    patterns = [text for text in given if isinstance(text, str) and text not in ("", "all-linear")]
    for keys in (fields.get(name) for name in _KEYS):
        if isinstance(keys, Mapping):
            patterns += [KEY_PATTERN.format(key) for key in keys]
    number = await _num_in_time(patterns) if patterns else 0
    if number < len(patterns):
        raise InvalidRequestError(
            f"the pattern {patterns[number][:80]!r} takes too long to match; repeat nothing within "
            "a repetition, or list the modules",
            param,
        )


async def _num_in_time(patterns: Sequence[str]) -> int:
    """How many of them end in time, before the first that does not."""
    names = [module_name(layer, module) for layer in range(_MOST_LAYERS) for module in Module]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _TRY),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    done, _ = await process.communicate(json.dumps([patterns, names, _LIMIT_S]).encode())
    # What is no regular expression at all, others refuse with better words.
    return len(done) if process.returncode == -signal.SIGVTALRM else len(patterns)
