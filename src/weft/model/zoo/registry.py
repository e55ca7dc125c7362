"""Built-in models by name, and the one resolver of a MODEL on a command line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from weft.base.errors import ConfigError, ModelLoadError
from weft.graph.capture import Capture, Loss, trace
from weft.graph.graph import Graph


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A module with what it takes to train it: example inputs and targets (batch 2), and a loss.

    `example_inputs` are positional (tuple) or keyword (mapping) arguments. `batch_axes` is as in
    `weft.capture`. `batch_size` is the mini-batch that the model's source trains with, as a default
    for planning.
    """

    name: str
    module: nn.Module
    example_inputs: tuple[Any, ...] | Mapping[str, Any]
    targets: tuple[Any, ...] = ()
    loss: Loss | None = None
    batch_axes: int | Sequence[int | None] = 0
    batch_size: int = 64

    def graph(self, *, training: bool = True) -> Graph:
        """The model's computation graph, at operator level."""
        return self.trace(training=training).graph

    def trace(self, *, training: bool = True) -> Capture:
        """The graph with the exported program beside it."""
        return trace(
            self.module,
            self.example_inputs,
            loss=self.loss,
            targets=self.targets,
            batch_axes=self.batch_axes,
            training=training,
            name=self.name,
        )


Builder = Callable[..., ZooModel]

_BUILDERS: dict[str, tuple[str, str]] = {
    "mmt": ("weft.model.zoo.mmt", "mmt"),
    "case-study": ("weft.model.zoo.mmt", "case_study"),
    "dlrm": ("weft.model.zoo.dlrm", "dlrm"),
    "candle-uno": ("weft.model.zoo.candle", "candle_uno"),
    "clip": ("weft.model.zoo.clip", "clip"),
    "unet": ("weft.model.zoo.unet", "unet"),
    "gpt": ("weft.model.zoo.gpt", "gpt"),
    "llava": ("weft.model.zoo.huggingface", "llava"),
    "llama": ("weft.model.zoo.huggingface", "llama"),
}

NAMES: tuple[str, ...] = tuple(sorted(_BUILDERS))
"""Names that `load` takes."""


def load(name: str, *, device: str = "meta", **options: Any) -> ZooModel:
    """Build a zoo model on `device`; on "meta" its weights need no memory.

    `options` are the builder's keyword arguments (see `options_of`); ConfigError names the nearest
    valid name or option.
    """
    builder = _builder(name)
    valid = options_of(name)
    for option in options:
        if option not in valid:
            near = difflib.get_close_matches(option, valid, n=1, cutoff=0.0)
            raise ConfigError(
                f"model {name!r} has no option {option!r}; the nearest is {near[0]!r} "
                f"(all: {', '.join(valid)})"
            )
    with torch.device(device):
        return builder(**options)


def options_of(name: str) -> Mapping[str, Any]:
    """The options of a zoo model and their defaults."""
    parameters = inspect.signature(_builder(name)).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def _builder(name: str) -> Builder:
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown model {name!r}; the nearest built-in one is {near[0]!r} "
            f"(all: {', '.join(NAMES)}); or give `package.module:function`"
        )
    module, function = _BUILDERS[name]
    return cast(Builder, getattr(import_module(module), function))


def resolve_model(
    spec: str, options: Mapping[str, Any] | None = None, *, device: str = "meta"
) -> ZooModel:
    """The model that MODEL on a command line means.

    `spec` is a built-in name, `gpt-96` for a GPT of 96 layers, or `package.module:function`, a
    function that returns (module, example inputs) or a ZooModel. It is called on `device`; on
    "meta" it needs no memory. `options` are its keyword arguments.
    """
    options = dict(options or {})
    if ":" in spec:
        return _user_model(spec, options, device)
    family, _, depth = spec.rpartition("-")
    if family == "gpt" and depth.isdigit():
        return load("gpt", device=device, num_layers=int(depth), **options)
    return load(spec, device=device, **options)


def resolve(spec: str, options: Mapping[str, Any] | None = None) -> Graph:
    """The graph of the model that MODEL on a command line means; see `resolve_model`."""
    return resolve_model(spec, options).graph()


def _user_model(spec: str, options: Mapping[str, Any], device: str) -> ZooModel:
    path, _, attribute = spec.partition(":")
    try:
        function = getattr(import_module(path), attribute)
    except ImportError as error:
        raise ModelLoadError(
            f"cannot import {path!r} for model {spec!r}: {error}; run where it can be imported, "
            "or set PYTHONPATH"
        ) from None
    except AttributeError:
        raise ModelLoadError(
            f"module {path!r} has no function {attribute!r}; a model is `package.module:function`"
        ) from None
    try:
        with torch.device(device):
            result = function(**options)
    except Exception as error:  # the user's code: any type may come
        raise ModelLoadError(f"{spec!r} failed: {type(error).__name__}: {error}") from error
    if isinstance(result, ZooModel):
        return result
    if not (isinstance(result, tuple) and len(cast(tuple[Any, ...], result)) == 2):
        raise ModelLoadError(
            f"{spec!r} returned {type(result).__name__}; it must return (module, example inputs) "
            "or a ZooModel"
        )
    module, inputs = cast(tuple[Any, Any], result)
    if not isinstance(module, nn.Module):
        raise ModelLoadError(
            f"{spec!r} returned {type(module).__name__} as its module; it must be an nn.Module"
        )
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    return ZooModel(name=attribute, module=module, example_inputs=inputs)
