"""The small model that ships with Weft: it completes Python, it does not converse."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

EMBEDDED_MODEL_NAME = "weft-embedded"
"""What `weft serve` without a model serves."""


def embedded_model_path() -> Path:
    """Directory of the embedded model, in Hugging Face layout."""
    return Path(str(files("weft") / "assets" / "model"))
