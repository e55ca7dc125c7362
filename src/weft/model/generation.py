"""What `generation_config.json` says of stopping and of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from weft.base.errors import InvalidRequestError, ModelLoadError
from weft.engine.sampling import SamplingParams
from weft.model.config import ModelConfig, read_json_object, token_ids

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """Where a model's generations stop, and the sampling that its authors advise."""

    eos_token_ids: tuple[int, ...] = ()
    """All of them, those of config.json included."""
    sampling: Mapping[str, int | float] = field(default_factory=dict[str, int | float])
    """`SamplingParams` fields that apply where a request says nothing. Lengths (max_length,
    max_new_tokens) are not among them: how much to write is for the request to say."""

    @classmethod
    def from_directory(cls, directory: str | Path, config: ModelConfig) -> GenerationDefaults:
        """Read `generation_config.json` where there is one.

        Raises:
            ModelLoadError: it is malformed, an EOS id lies beyond the vocabulary, or a sampling
                default outside its range.
        """
        path = Path(directory) / "generation_config.json"
        if not path.is_file():
            return cls(eos_token_ids=config.eos_token_ids)
        return cls.from_dict(read_json_object(path), config, str(path))

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], config: ModelConfig, source: str = "generation_config.json"
    ) -> GenerationDefaults:
        """Interpret a parsed `generation_config.json`; raises as `from_directory` does."""
        own = token_ids(raw.get("eos_token_id"), source, "eos_token_id")
        eos = tuple(dict.fromkeys((*own, *config.eos_token_ids)))
        if any(token >= config.vocab_size for token in eos):
            raise ModelLoadError(
                f"{source}: eos_token_id {eos} lies beyond vocab_size ({config.vocab_size})"
            )
        sampling: dict[str, int | float] = {}
        for key in _SAMPLING_KEYS:
            value = raw.get(key)
            if value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ModelLoadError(f"{source}: {key} is {value!r}; a number is needed")
            sampling[key] = value
        try:
            SamplingParams(**cast("Any", sampling))
        except InvalidRequestError as error:
            raise ModelLoadError(
                f"{source}: {error.message}; every request without its own would fail"
            ) from None
        return cls(eos_token_ids=eos, sampling=sampling)
