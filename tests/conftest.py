"""Settings of the whole test run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Without a GPU Triton programs run in its interpreter. The switch is read when triton is imported,
# which torch may do at any time, so it must be set before any test module is.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# No test may wait for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What servers measure of tiny models is kept apart from the user's own, and over test runs.
os.environ.setdefault("XDG_CACHE_HOME", str(Path(tempfile.gettempdir()) / "weft-tests-cache"))
