"""Checkpoints in safetensors, single or sharded, with every tensor checked by name and shape."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.base.errors import ModelLoadError
from weft.model.config import ModelConfig, read_json_object
from weft.model.weights import DecoderWeights, MakeLinear, build_weights, checkpoint_shapes

_log = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Derived tensors that older checkpoints carry."""
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SafetensorsSource:
    """Tensors of a checkpoint directory, read one by one; a context manager.

    Raises:
        ModelLoadError: no checkpoint, a missing or truncated file, or an index that names
            files or tensors that are not there; the message names file and tensor.
    """

    def __init__(
        self, directory: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._dtype = dtype
        self._device = torch.device(device)
        self._files: dict[Path, safe_open] = {}
        self._paths: dict[str, Path] = {}
        for path, promised in _checkpoint_files(Path(directory)).items():
            handle = self._files[path] = _open(path)
            names = set(handle.keys())
            for name in promised - names:
                raise ModelLoadError(
                    f"{path} lacks tensor {name}, which {_INDEX} promises; the checkpoint is "
                    "incomplete: copy it again"
                )
            self._paths.update(dict.fromkeys(promised or names, path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files; tensors that were handed out stay valid."""
        self._files.clear()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors of the checkpoint."""
        return frozenset(self._paths)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        path = self._paths.get(name)
        if path is None:
            where = ", ".join(sorted({p.name for p in self._paths.values()}))
            raise ModelLoadError(f"tensor {name} of shape {shape} is missing in {where}")
        handle = self._files[path]
        try:
            found = tuple(handle.get_slice(name).get_shape())
            if found != shape:
                raise ModelLoadError(
                    f"{path}: tensor {name} has shape {found}; config.json asks for {shape}"
                )
            value = handle.get_tensor(name)
        except SafetensorError as error:
            raise ModelLoadError(f"{path}: tensor {name} cannot be read: {error}") from error
        if value.dtype not in _FLOATS:
            raise ModelLoadError(
                f"{path}: tensor {name} is {value.dtype}; floating-point weights are needed "
                "(quantised checkpoints are not supported)"
            )
        # A copy even where nothing changes: the mapped file may be replaced under us.
        return value.to(device=self._device, dtype=self._dtype, copy=True).contiguous()


def load_weights(
    directory: str | Path,
    config: ModelConfig,
    make_linear: MakeLinear,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> DecoderWeights:
    """Load a checkpoint.

    An output layer that config.json calls tied, and that the checkpoint holds with other values
    than the embedding's, is loaded as it stands, with a warning, as transformers does.

    Raises:
        ModelLoadError: a file is missing or truncated, or a tensor is missing, unexpected or of
            another shape than `config` asks for; the message names file and tensor.
    """
    with SafetensorsSource(directory, dtype=dtype, device=device) as source:
        if config.tie_word_embeddings and _HEAD in source.names:
            config = _untie_if_different(source, config, Path(directory))
        _check_names(source, config, Path(directory))
        return build_weights(config, source, make_linear)


def _untie_if_different(
    source: SafetensorsSource, config: ModelConfig, directory: Path
) -> ModelConfig:
    shape = (config.vocab_size, config.hidden_size)
    if _EMBEDDING not in source.names or torch.equal(
        source.tensor(_EMBEDDING, shape), source.tensor(_HEAD, shape)
    ):
        return config
    _log.warning(
        "%s: tie_word_embeddings is true, but %s differs from %s; it is used as it stands, untied "
        "(set tie_word_embeddings to false to say so)",
        directory,
        _HEAD,
        _EMBEDDING,
    )
    return replace(config, tie_word_embeddings=False)


def _check_names(source: SafetensorsSource, config: ModelConfig, directory: Path) -> None:
    expected = checkpoint_shapes(config)
    missing = [name for name in expected if name not in source.names]
    if missing:
        raise ModelLoadError(
            f"{directory}: the checkpoint lacks {_some(missing)}, which config.json asks for"
        )
    unexpected = sorted(name for name in source.names - set(expected) if not _IGNORED.search(name))
    if config.tie_word_embeddings and _HEAD in unexpected:
        unexpected.remove(_HEAD)  # the embedding itself, written twice
    if unexpected:
        raise ModelLoadError(
            f"{directory}: the checkpoint holds {_some(unexpected)}, which a {config.family} model "
            "of this config.json does not have; leaving it out would give wrong answers"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _checkpoint_files(directory: Path) -> dict[Path, set[str]]:
    """Each file and the tensors promised of it; an empty set promises whatever it holds."""
    index = directory / _INDEX
    if not index.is_file():
        if (directory / _SINGLE).is_file():
            return {directory / _SINGLE: set()}
        raise ModelLoadError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; only safetensors are read"
            f"{_other_formats(directory)}"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} holds no weight_map; the checkpoint is incomplete")
    files: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        path = directory / str(file_name)
        if path.parent.resolve() != directory.resolve():
            raise ModelLoadError(f"{index}: {file_name} lies outside the model directory")
        files.setdefault(path, set()).add(str(name))
    for path, names in files.items():
        if not path.is_file():
            raise ModelLoadError(
                f"{path} is missing, which {_INDEX} names for {_some(sorted(names))}; the "
                "checkpoint is incomplete: copy it again"
            )
    return files


def _other_formats(directory: Path) -> str:
    others = sorted(
        path.name for path in directory.glob("*") if path.suffix in (".bin", ".pth", ".gguf", ".pt")
    )
    if not others:
        return ""
    return f" (found {_some(others)}: convert with transformers' save_pretrained)"


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{path} is no complete safetensors file ({error}); it may be half-written: copy it "
            "again"
        ) from error
