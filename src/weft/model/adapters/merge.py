"""An adapter added into its base's weights: a model directory that needs no adapter.

Shape legend: K in_features, N out_features, r rank.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.base.errors import ConfigError, ModelLoadError, UnsupportedError
from weft.graph.adapter_spec import AdapterKind, module_name
from weft.model.adapters.files import read_adapter, read_adapter_spec
from weft.model.adapters.weights import Bypass
from weft.model.config import ModelConfig

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")


def merge_adapter(base: Path, adapter: Path, out: Path) -> int:
    """Write the model at `base` with an adapter merged in to `out`; returns how many weights.

    Sums are taken in float32 (float64 for a float64 model) and rounded once to the base's dtype.
    The directory appears whole or not at all.

    Raises:
        ConfigError: `out` holds something already.
        AdapterLoadError: the adapter is malformed, or of another base.
        UnsupportedError: a bottleneck, or a base that keeps its weights under other names.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty; choose another")
    if read_adapter_spec(adapter).kind is AdapterKind.BOTTLENECK:
        raise UnsupportedError(
            "a bottleneck cannot be merged, since it is no linear function of its input; LoRA and "
            "(IA)³ can"
        )
    config = ModelConfig.from_directory(base)
    bypasses = {
        module_name(bypass.target.layer, bypass.target.module): bypass
        for bypass in read_adapter(adapter, config, dtype=torch.float64)
    }
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        merged: set[str] = set()
        for path in sorted(base.glob("*.safetensors")):
            merged |= _merge_file(path, partial / path.name, bypasses)
        missing = sorted(set(bypasses) - merged)
        if missing:
            raise UnsupportedError(
                f"{base} has no weight {missing[0]}.weight; a base that stores its linears fused "
                "or under other names cannot be merged"
            )
        for pattern in _COPIED:
            for path in base.glob(pattern):
                shutil.copy(path, partial / path.name)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(merged)


def _merge_file(source: Path, target: Path, bypasses: dict[str, Bypass]) -> set[str]:
    merged: set[str] = set()
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                module, _, kind = name.rpartition(".")
                bypass = bypasses.get(module)
                if bypass is not None and kind in ("weight", "bias"):
                    tensor = _merged(tensor, kind, bypass)
                    merged.add(module)
                tensors[name] = tensor.contiguous()
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{source} cannot be read: {error}") from error
    save_file(tensors, target, metadata=metadata)
    return merged


def _merged(tensor: Tensor, kind: str, bypass: Bypass) -> Tensor:
    """[N, K] of a weight, [N] of a bias."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    weights = {name: weight.to(dtype) for name, weight in bypass.weights.items()}
    value = tensor.to(dtype)
    if "l" in weights:
        if bypass.target.scales_input:
            value = value * weights["l"] if kind == "weight" else value
        else:
            value = value * (weights["l"][:, None] if kind == "weight" else weights["l"])
    elif kind == "weight":
        value = value + bypass.target.scale * (weights["B"] @ weights["A"])
    return value.to(tensor.dtype)
