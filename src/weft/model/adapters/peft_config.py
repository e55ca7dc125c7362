"""PEFT's adapter_config.json to and from `AdapterSpec`; what Weft does not run is refused by name.

Names and meanings follow peft 0.19's LoraConfig and IA3Config. A key that is in neither table below
and holds anything but nothing is refused: it might change what the adapter computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.base.errors import AdapterLoadError, ConfigError, UnsupportedError
from weft.graph.adapter_spec import AdapterKind, AdapterSpec

_KINDS = {"LORA": AdapterKind.LORA, "IA3": AdapterKind.IA3}
_READ_OF_BOTH = frozenset(("peft_type", "target_modules", "exclude_modules"))
_READ_OF = {
    AdapterKind.LORA: _READ_OF_BOTH
    | {
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
    },
    AdapterKind.IA3: _READ_OF_BOTH | {"feedforward_modules"},
}
_WITHOUT_EFFECT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "init_ia3_weights",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    )
)
"""They name a place or a way in which the adapter was made, not what it computes."""
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # These begin with other numbers in A and B and leave the base as it is.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "layers_pattern": ("layers", ["layers"]),
    "task_type": ("CAUSAL_LM",),
}
_MOST = 2**63
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing (arrow_config)",
    "fan_in_fan_out": "fan_in_fan_out (Conv1D layers)",
    "layer_replication": "layer_replication",
    "lora_bias": "a bias on LoRA's B (lora_bias)",
    "megatron_config": "megatron_config",
    "modules_to_save": "whole modules trained beside the adapter (modules_to_save)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QA-LoRA (use_qalora)",
}


def spec_from_peft(raw: Mapping[str, Any], source: str) -> AdapterSpec:
    """What a parsed adapter_config.json says; `source` names the file in messages.

    Raises:
        UnsupportedError: it asks for something that Weft does not run; the message names it.
        AdapterLoadError: a value is malformed or out of its range.
    """
    kind = _KINDS.get(str(raw.get("peft_type")))
    if kind is None:
        raise UnsupportedError(
            f"{source}: peft_type is {raw.get('peft_type')!r}, which is not supported; supported "
            f"are {', '.join(_KINDS)}"
        )
    _refuse_variants(raw, source, _READ_OF[kind])
    if isinstance(raw.get("target_modules"), str) and raw.get("layers_to_transform") is not None:
        raise AdapterLoadError(
            f"{source}: layers_to_transform needs target_modules to be a list; put the layers "
            "into the regular expression"
        )
    try:
        common: dict[str, Any] = {
            "kind": kind,
            "target_modules": _names(raw, "target_modules"),
            "exclude_modules": _names(raw, "exclude_modules", ()),
        }
        if kind is AdapterKind.IA3:
            # An empty list is allowed here, and scales outputs only.
            return AdapterSpec(**common, feedforward_modules=_names(raw, "feedforward_modules", ()))
        return AdapterSpec(
            **common,
            rank=_number(raw, "r", 8, whole=True),
            alpha=float(_number(raw, "lora_alpha", 8)),
            use_rslora=bool(raw.get("use_rslora")),
            dropout=float(_number(raw, "lora_dropout", 0.0)),
            rank_pattern=_pattern(raw, "rank_pattern", whole=True),
            alpha_pattern=_pattern(raw, "alpha_pattern", whole=False),
            layers_to_transform=_layers(raw.get("layers_to_transform")),
        )
    except ConfigError as error:
        raise AdapterLoadError(f"{source}: {error}") from error


def spec_to_peft(spec: AdapterSpec, base_model: str) -> dict[str, Any]:
    """The adapter_config.json that peft loads to the same adapter.

    Raises:
        UnsupportedError: PEFT has no such adapter (a bottleneck).
    """
    if spec.kind is AdapterKind.BOTTLENECK:
        raise UnsupportedError("PEFT has no file format for bottleneck adapters")
    raw: dict[str, Any] = {
        "peft_type": spec.kind.name,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": _plain(spec.target_modules),
        "exclude_modules": _plain(spec.exclude_modules) or None,
    }
    if spec.kind is AdapterKind.IA3:
        return raw | {"feedforward_modules": _plain(spec.feedforward_modules)}
    layers = spec.layers_to_transform
    return raw | {
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        "use_rslora": spec.use_rslora,
        "lora_dropout": spec.dropout,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "layers_to_transform": None if layers is None else list(layers),
        "bias": "none",
        "init_lora_weights": True,
    }


def _refuse_variants(raw: Mapping[str, Any], source: str, read: frozenset[str]) -> None:
    for key, value in raw.items():
        if not value or key in read or key in _WITHOUT_EFFECT:
            continue
        if key in _HARMLESS:
            if value in _HARMLESS[key]:
                continue
            raise UnsupportedError(
                f"{source}: {key} is {value!r}, which is not supported; supported are "
                f"{', '.join(map(repr, _HARMLESS[key]))}"
            )
        raise UnsupportedError(
            f"{source}: {_REFUSED.get(key, f'{key} = {value!r}')} is not supported; plain LoRA and "
            "(IA)³ are"
        )


def _plain(names: tuple[str, ...] | str) -> list[str] | str:
    return names if isinstance(names, str) else list(names)


def _names(
    raw: Mapping[str, Any], key: str, default: tuple[str, ...] | None = None
) -> tuple[str, ...] | str:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ConfigError(
        f"{key} is {value!r}; it must be a list of names, a regular expression or all-linear"
    )


def _number(raw: Mapping[str, Any], key: str, default: float, *, whole: bool = False) -> Any:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{key} is {value!r}; it must be a {'whole ' if whole else ''}number")
    if abs(value) > _MOST:  # JSON's numbers know no bound, floats do.
        raise ConfigError(f"{key} is beyond {_MOST}")
    return value


def _pattern(raw: Mapping[str, Any], key: str, *, whole: bool) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {value!r}; it must map module names to numbers")
    return {name: _number(value, name, 0, whole=whole) for name in value}


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ConfigError(f"layers_to_transform is {value!r}; it must be a list of layer numbers")
    return tuple(layers)
