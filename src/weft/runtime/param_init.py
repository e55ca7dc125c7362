"""Initial weights that do not depend on the plan: the module's own, seeded, or from safetensors."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from weft.base.errors import ModelLoadError, UnsupportedError

Initialiser = Callable[[str, Tensor], None]
"""Fills the parameter of this name in place; torch's generator is seeded for it alone."""


class WeightSource(Protocol):
    """Where a run's first weights come from."""

    def load(self, names: Sequence[str], module: nn.Module) -> Mapping[str, Tensor]:
        """The values of these parameters (canonical names), on the CPU.

        Every rank asks for its own; equal names give equal values on every rank.
        """
        ...


class ModuleWeights:
    """The values that the module itself holds; it must be built alike on every rank."""

    def load(self, names: Sequence[str], module: nn.Module) -> Mapping[str, Tensor]:
        """The module's own values; UnsupportedError where one is on the meta device."""
        held = dict(module.named_parameters(remove_duplicate=False))
        for name in names:
            if held[name].is_meta:
                raise UnsupportedError(
                    f"parameter {name!r} has no value (it is on the meta device); start from "
                    "SeededWeights or SafetensorsWeights, or build the module with values"
                )
        return {name: held[name].detach() for name in names}


class SeededWeights:
    """Each module's own initialisation (`reset_parameters`, transformers' `_init_weights`), seeded.

    The seed of a module's draws is a hash of (seed, its path), so a rank draws only what it holds
    and any plan starts from the same weights. `init` takes the place of the modules' own. A
    parameter whose module says nothing keeps the value that it was built with.
    """

    def __init__(self, seed: int = 0, init: Initialiser | None = None) -> None:
        self.seed = seed
        self.init = init

    def load(self, names: Sequence[str], module: nn.Module) -> Mapping[str, Tensor]:
        """Draw the weights of every module that holds one of these names."""
        found: dict[str, Tensor] = {}
        by_owner: dict[str, list[str]] = {}
        for name in names:
            by_owner.setdefault(name.rpartition(".")[0], []).append(name)
        for path, members in by_owner.items():
            owner = module.get_submodule(path)
            drawn = self._draw(path, owner, module, members)
            found |= {name: drawn[name.rpartition(".")[2]] for name in members}
        return found

    def _draw(
        self, path: str, owner: nn.Module, root: nn.Module, members: Sequence[str]
    ) -> dict[str, Tensor]:
        own = {leaf: p for leaf, p in owner._parameters.items() if p is not None}
        if self.init is not None:
            drawn: dict[str, Tensor] = {}
            for name in members:
                value = torch.empty(own[name.rpartition(".")[2]].shape, dtype=_dtype(own, name))
                with _seeded(self.seed, name), torch.no_grad():
                    self.init(name, value)
                drawn[name.rpartition(".")[2]] = value
            return drawn
        reset = _reset_of(owner, root)
        if reset is None:
            for leaf, value in own.items():
                if value.is_meta:
                    raise UnsupportedError(
                        f"parameter {leaf!r} of module {path or '.'!r} "
                        f"({type(owner).__name__}) has no value and its module no "
                        "reset_parameters(); pass SeededWeights(init=...), or build the module "
                        "with `empty_parameters()`, which keeps such values"
                    )
            return {leaf: value.detach().clone() for leaf, value in own.items()}
        fresh = _on_cpu(owner)
        with _seeded(self.seed, path), torch.no_grad():
            reset(fresh)
        return {leaf: p.detach() for leaf, p in fresh._parameters.items() if p is not None}


class SafetensorsWeights:
    """Weights by name from a safetensors file, or a directory of them (with an index or not)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def load(self, names: Sequence[str], module: nn.Module) -> Mapping[str, Tensor]:
        """Read just these names, in the model's dtypes.

        ModelLoadError lists what is missing or has another shape.
        """
        files = self._files()
        aliases = _aliases(module)
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            here = next((alias for alias in aliases[name] if alias in files), None)
            if here is None:
                missing.append(name)
            else:
                by_file.setdefault(files[here], []).append((name, here))
        if missing:
            raise ModelLoadError(
                f"{str(self.path)!r} lacks {len(missing)} of {len(names)} parameters, first "
                f"{missing[0]!r}; it holds {len(files)}, first "
                f"{min(files, default='none')!r}; give weights of this model"
            )
        own = dict(module.named_parameters(remove_duplicate=False))
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name, here in wanted:
                    value: Tensor = tensors.get_tensor(here)
                    if value.shape != own[name].shape:
                        raise ModelLoadError(
                            f"parameter {here!r} in {str(file)!r} has shape "
                            f"{tuple(value.shape)}; the model's is {tuple(own[name].shape)}"
                        )
                    # The model was captured with its own dtype; files often hold bfloat16.
                    found[name] = value.to(own[name].dtype)
        return found

    def fill_buffers(self, module: nn.Module) -> None:
        """Copy the persistent buffers that the files hold into the module's own.

        ModelLoadError where one has another shape; buffers that are not there keep their values.
        """
        files, trained = self._files(), dict(module.named_parameters(remove_duplicate=False))
        buffers = {n: b for n, b in module.state_dict().items() if n not in trained and n in files}
        for name, buffer in buffers.items():
            with safe_open(files[name], framework="pt") as tensors:
                value: Tensor = tensors.get_tensor(name)
            if value.shape != buffer.shape:
                raise ModelLoadError(
                    f"buffer {name!r} in {str(files[name])!r} has shape {tuple(value.shape)}; the "
                    f"model's is {tuple(buffer.shape)}"
                )
            if not buffer.is_meta:
                buffer.copy_(value)

    def _files(self) -> dict[str, Path]:
        """The file of every name."""
        if self.path.is_dir():
            index = self.path / "model.safetensors.index.json"
            if index.exists():
                entries: dict[str, str] = json.loads(index.read_text())["weight_map"]
                return {name: self.path / file for name, file in entries.items()}
            files = sorted(self.path.glob("*.safetensors"))
        else:
            files = [self.path] if self.path.exists() else []
        if not files:
            raise ModelLoadError(
                f"{str(self.path)!r} is no safetensors file and no directory that holds one"
            )
        found: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        return found


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, modules that can initialise themselves get their parameters on the meta device.

    Buffers, and parameters of modules without `reset_parameters`, keep the values that they are
    built with; so at no time more than one large parameter takes memory. `load_state_dict` raises
    UnsupportedError: its values would be lost.
    """
    register, load_state = nn.Module.register_parameter, nn.Module.load_state_dict

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is empty already may be tied to another module: it stays the same object.
        if param is not None and not param.is_meta and hasattr(module, "reset_parameters"):
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    def refuse_state(module: nn.Module, *_: Any, **__: Any) -> None:
        raise UnsupportedError(
            f"{type(module).__name__}.load_state_dict was called while the model is built without "
            "values, so what it loads would be lost; give trained weights as SafetensorsWeights "
            "(`weft train --weights`)"
        )

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    nn.Module.load_state_dict = refuse_state  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Module.load_state_dict = load_state  # type: ignore[method-assign]


def _reset_of(owner: nn.Module, root: nn.Module) -> Callable[[nn.Module], Any] | None:
    """What initialises this module, if anything does: the model's own rule goes first."""
    own_rule = getattr(root, "_init_weights", None)
    if callable(own_rule):
        return own_rule
    if callable(getattr(owner, "reset_parameters", None)):
        return lambda fresh: cast(Any, fresh).reset_parameters()
    return None


def _on_cpu(owner: nn.Module) -> nn.Module:
    """A copy of a module without its children, its parameters allocated and not yet filled."""
    fresh = copy.copy(owner)
    fresh._parameters = {
        leaf: None
        if p is None
        else nn.Parameter(torch.empty_like(p, device="cpu"), requires_grad=p.requires_grad)
        for leaf, p in owner._parameters.items()
    }
    for leaf, value in fresh._parameters.items():
        old = owner._parameters[leaf]
        if value is not None and old is not None and not old.is_meta:
            value.data.copy_(old)
    return fresh


def _dtype(own: Mapping[str, Tensor], name: str) -> torch.dtype:
    return own[name.rpartition(".")[2]].dtype


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """All paths of each canonical name, the canonical one first."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for path, tensor in module.named_parameters(remove_duplicate=False):
        found.setdefault(first.setdefault(id(tensor), path), []).append(path)
    return found


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """torch's CPU generator seeded by (seed, name) inside, as it was outside."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield
