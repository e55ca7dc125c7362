"""Adapter directories: PEFT's for LoRA and (IA)³, one of ours for bottlenecks. Safetensors only.

Ours holds `bottleneck.json` (kind, rank, target_modules, exclude_modules, rank_pattern,
layers_to_transform, activation) and `bottleneck.safetensors`, whose tensors are named after the
sub-layer they follow: `model.layers.0.mlp.bottleneck.down.weight`, `.down.bias`, `.up.weight`,
`.up.bias`.

Shape legend: K in_features, N out_features, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.base.errors import AdapterLoadError, ConfigError, ModelLoadError, UnsupportedError
from weft.graph.adapter_spec import AdapterKind, AdapterSpec, BypassTarget, module_name
from weft.model.adapters.peft_config import spec_from_peft, spec_to_peft
from weft.model.adapters.weights import (
    AdapterWeights,
    Bypass,
    FrozenBypass,
    collect_layers,
    model_targets,
    pack,
    weight_shapes,
)
from weft.model.config import ModelConfig, read_json_object

_PEFT_CONFIG = "adapter_config.json"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_OUR_CONFIG = "bottleneck.json"
_OUR_WEIGHTS = "bottleneck.safetensors"
_OUR_KEYS = (
    "rank",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "layers_to_transform",
    "activation",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PEFT_PREFIX = "base_model.model."
_SUFFIXES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "l": "ia3_l",
    "down": "bottleneck.down.weight",
    "down_bias": "bottleneck.down.bias",
    "up": "bottleneck.up.weight",
    "up_bias": "bottleneck.up.bias",
}


def read_adapter_spec(directory: str | Path) -> AdapterSpec:
    """What an adapter directory says of itself, without its weights.

    Raises:
        AdapterLoadError: it is no adapter directory, or its configuration is malformed.
        UnsupportedError: it asks for something that Weft does not run.
    """
    directory = Path(directory)
    try:
        if (directory / _OUR_CONFIG).is_file():
            path = directory / _OUR_CONFIG
            return _bottleneck_spec(read_json_object(path), str(path))
        path = directory / _PEFT_CONFIG
        if not path.is_file():
            raise AdapterLoadError(
                f"{directory} holds neither {_PEFT_CONFIG} (PEFT) nor {_OUR_CONFIG}; it is no "
                "adapter directory"
            )
        return spec_from_peft(read_json_object(path), str(path))
    except ModelLoadError as error:
        raise AdapterLoadError(str(error)) from error


def read_adapter(
    directory: str | Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> AdapterWeights:
    """Load an adapter for a model, in the model's dtype.

    Raises:
        AdapterLoadError: a file is missing or broken, a tensor is missing, unknown, not finite, or
            of a shape that this model does not have (an adapter of another base).
        UnsupportedError: it asks for something that Weft does not run.
    """
    directory = Path(directory)
    spec = read_adapter_spec(directory)
    path = _weights_path(directory, spec)
    try:
        targets = model_targets(spec, config)
    except ConfigError as error:
        raise AdapterLoadError(f"{directory} does not fit this model: {error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            bypasses = _read_bypasses(file, path, spec, targets, dtype)
    except (SafetensorError, OSError) as error:
        raise AdapterLoadError(f"{path} is truncated or damaged: {error}") from error
    adapter = AdapterWeights(kind=spec.kind, layers=collect_layers(bypasses, config.num_layers))
    return pack(adapter, device)


def write_adapter(
    directory: str | Path, spec: AdapterSpec, adapter: AdapterWeights, *, base_model: str = ""
) -> None:
    """Write an adapter that `read_adapter`, and peft for LoRA and (IA)³, load to the same weights.

    Files are written in place: a caller who must survive a crash renames the directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for bypass in adapter:
        for name, weight in bypass.weights.items():
            stored = weight.detach().to("cpu").reshape(_file_shape(bypass.target, name))
            tensors[_tensor_name(bypass.target, name)] = stored.contiguous()
    if spec.kind is AdapterKind.BOTTLENECK:
        raw: dict[str, Any] = {"kind": str(spec.kind)}
        raw |= {key: _jsonable(getattr(spec, key)) for key in _OUR_KEYS}
        names = (_OUR_CONFIG, _OUR_WEIGHTS)
    else:
        raw = spec_to_peft(_listed(spec, adapter), base_model)
        names = (_PEFT_CONFIG, _PEFT_WEIGHTS)
    save_file(tensors, directory / names[1], metadata={"format": "pt"})
    (directory / names[0]).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


# ---- reading ----


def _bottleneck_spec(raw: Mapping[str, Any], source: str) -> AdapterSpec:
    if raw.get("kind") != AdapterKind.BOTTLENECK:
        raise AdapterLoadError(f"{source}: kind is {raw.get('kind')!r}; it must be bottleneck")
    unknown = sorted(set(raw) - {"kind", *_OUR_KEYS})
    if unknown:
        raise UnsupportedError(f"{source}: {', '.join(unknown)} is not known here")
    given: dict[str, Any] = {
        key: tuple(v) if isinstance(v := raw[key], list) else v for key in raw if key != "kind"
    }
    try:
        return AdapterSpec(kind=AdapterKind.BOTTLENECK, **given)
    except (ConfigError, TypeError) as error:
        raise AdapterLoadError(f"{source}: {error}") from error


def _weights_path(directory: Path, spec: AdapterSpec) -> Path:
    path = directory / (_OUR_WEIGHTS if spec.kind is AdapterKind.BOTTLENECK else _PEFT_WEIGHTS)
    if path.is_file():
        return path
    pickles = [name for name in _PICKLES if (directory / name).exists()]
    if pickles:
        raise UnsupportedError(
            f"{directory / pickles[0]} is a pickle, which can run code when it is loaded and is "
            f"not supported; save the adapter as {_PEFT_WEIGHTS} (peft's default)"
        )
    raise AdapterLoadError(f"{path} is missing; the adapter is incomplete: copy it again")


def _read_bypasses(
    file: Any,
    path: Path,
    spec: AdapterSpec,
    targets: tuple[BypassTarget, ...],
    dtype: torch.dtype,
) -> list[Bypass]:
    names = set(file.keys())
    known = {_tensor_name(target, name) for target in targets for name in weight_shapes(target)}
    unknown, missing = sorted(names - known), sorted(known - names)
    if missing or unknown:
        raise AdapterLoadError(
            f"{path} does not hold what its configuration means on this model: "
            + "; ".join(
                f"{word} {', '.join(some[:3])}" + (f" and {len(some) - 3} more" * (len(some) > 3))
                for word, some in (("it lacks", missing), ("it has besides", unknown))
                if some
            )
        )
    bypasses: list[Bypass] = []
    for target in targets:
        weights: dict[str, Tensor] = {}
        for name, shape in weight_shapes(target).items():
            weights[name] = _read_tensor(file, path, target, name).reshape(shape).to(dtype)
        bypasses.append(FrozenBypass(target=target, weights=weights, activation=spec.activation))
    return bypasses


def _read_tensor(file: Any, path: Path, target: BypassTarget, name: str) -> Tensor:
    tensor_name = _tensor_name(target, name)
    wanted = _file_shape(target, name)
    found = tuple(file.get_slice(tensor_name).get_shape())
    if found != wanted:
        raise AdapterLoadError(
            f"{path}: {tensor_name} has shape {list(found)}, but this model needs {list(wanted)}; "
            "the adapter was made for another base model, or its rank is not what it says"
        )
    tensor = file.get_tensor(tensor_name)
    if tensor.dtype not in _DTYPES:
        raise AdapterLoadError(
            f"{path}: {tensor_name} holds {tensor.dtype}; it must hold float32, bfloat16, float16 "
            "or float64"
        )
    if not torch.isfinite(tensor).all():
        raise AdapterLoadError(f"{path}: {tensor_name} holds NaN or infinity")
    return tensor


def _tensor_name(target: BypassTarget, name: str) -> str:
    prefix = _PEFT_PREFIX if name in ("A", "B", "l") else ""
    return f"{prefix}{module_name(target.layer, target.module)}.{_SUFFIXES[name]}"


def _file_shape(target: BypassTarget, name: str) -> tuple[int, ...]:
    """PEFT keeps (IA)³ as a row [1, K] where it scales inputs, else as a column [N, 1]."""
    (*shape,) = weight_shapes(target)[name]
    if name == "l":
        shape = [1, *shape] if target.scales_input else [*shape, 1]
    return tuple(shape)


# ---- writing ----


def _listed(spec: AdapterSpec, adapter: AdapterWeights) -> AdapterSpec:
    """Targets in words that PEFT has: `all-linear` spelt out, and whole names where it has no
    `layers_to_transform` ((IA)³, and beside a regular expression)."""
    targets = [bypass.target for bypass in adapter]
    is_ia3 = spec.kind is AdapterKind.IA3
    is_pattern = isinstance(spec.target_modules, str) and spec.target_modules != "all-linear"
    if spec.target_modules == "all-linear":
        found = dict.fromkeys(str(target.module) for target in targets)
        spec = replace(spec, target_modules=tuple(found))
    # Of (IA)³'s two lists, peft wants one within the other.
    is_nested = is_pattern or set(spec.feedforward_modules) <= set(spec.target_modules)
    is_cut = spec.layers_to_transform is not None and (is_pattern or is_ia3)
    if not is_cut and (is_nested or not is_ia3):
        return spec
    names = {module_name(target.layer, target.module): target for target in targets}
    return replace(
        spec,
        target_modules=tuple(names),
        feedforward_modules=tuple(name for name, t in names.items() if t.scales_input),
        layers_to_transform=None,
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
