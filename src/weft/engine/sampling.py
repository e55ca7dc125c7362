"""What a request asks of the sampler, and the counter-based random numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from weft.base.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
_GREEDY_EPSILON = 1e-5
"""Temperatures below this are greedy: dividing by them overflows float32 (as in vLLM)."""


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message, param=param)


def _require_type(param: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Booleans are not numbers here, though Python says that they are."""
    is_right = isinstance(value, kind) and not isinstance(value, bool)
    _require(is_right, param, f"{param} is or holds {value!r}; it must be {wanted}")


def _tuple(param: str, values: object) -> tuple[Any, ...]:
    if values is None:
        return ()
    is_list = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    _require(is_list, param, f"{param} is {values!r}; it must be a list")
    return tuple(cast("Iterable[Any]", values))


_INTEGERS = ("n", "top_k", "min_tokens")
_OPTIONAL_INTEGERS = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to draw tokens for one request; vLLM's names, defaults and meanings.

    Order of application, per row: logits mask and bans, logit_bias, penalties, temperature,
    min_p, top_k, top_p. `logprobs` are of the model's own distribution, before all of these.

    Raises:
        InvalidRequestError: a value lies outside its range; `param` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted once for a token that is in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token is in the output."""
    logit_bias: Mapping[int, float] | None = None
    stop: tuple[str, ...] = ()
    """One string, several, or None for none; kept as a tuple, as is the next."""
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    """None means until the model's context is full."""
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    """Log-probabilities of the sampled and of this many likeliest tokens, for each token."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple("stop", stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        self._check_types()
        # Beyond any vocabulary it keeps all; so large an int would not fit the sampler's columns.
        object.__setattr__(self, "top_k", min(self.top_k, 2**31 - 1))
        self._check_ranges()
        self._check_penalties()
        self._check_lengths()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken without a draw."""
        return self.temperature < _GREEDY_EPSILON

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler needs the counts of earlier tokens."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def _check_types(self) -> None:
        for name in _INTEGERS:
            _require_type(name, getattr(self, name), int, "a whole number")
        for name in _OPTIONAL_INTEGERS:
            if getattr(self, name) is not None:
                _require_type(name, getattr(self, name), int, "a whole number or None")
        for name in _NUMBERS:
            _require_type(name, getattr(self, name), (int, float), "a number")
        for name in _FLAGS:
            value = getattr(self, name)
            _require(value in (True, False), name, f"{name} is {value!r}; it must be True or False")
        for text in self.stop:
            _require_type("stop", text, str, "a string, or a list of strings")
        for token in self.stop_token_ids:
            _require_type("stop_token_ids", token, int, "a list of token ids")
        if self.logit_bias is not None:
            _require_type("logit_bias", self.logit_bias, Mapping, "a mapping of token id to bias")
            for token, bias in self.logit_bias.items():
                _require_type("logit_bias", token, int, "a mapping with token ids as keys")
                _require_type("logit_bias", bias, (int, float), "a mapping with numbers as values")

    def _check_ranges(self) -> None:
        _require(self.n >= 1, "n", f"n is {self.n}; it must be at least 1")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            f"temperature is {self.temperature}; it must be 0 (greedy) or more",
        )
        _require(
            self.top_k >= -1, "top_k", f"top_k is {self.top_k}; it must be 0 or -1 (all), or more"
        )
        _require(0 < self.top_p <= 1, "top_p", f"top_p is {self.top_p}; it must be in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", f"min_p is {self.min_p}; it must be in [0, 1]")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= MAX_LOGPROBS,
                name,
                f"{name} is {value}; it must be between 0 and {MAX_LOGPROBS}",
            )

    def _check_penalties(self) -> None:
        _require(
            0.01 <= self.repetition_penalty <= 100,
            "repetition_penalty",
            f"repetition_penalty is {self.repetition_penalty}; it must be in [0.01, 100]",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, f"{name} is {value}; it must be in [-2, 2]")
        for token, bias in (self.logit_bias or {}).items():
            _require(
                -100 <= bias <= 100,
                "logit_bias",
                f"logit_bias of token {token} is {bias}; it must be in [-100, 100]",
            )

    def _check_lengths(self) -> None:
        _require(
            self.max_tokens is None or self.max_tokens >= 0,
            "max_tokens",
            f"max_tokens is {self.max_tokens}; it must be 0 or more",
        )
        _require(
            self.min_tokens >= 0
            and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
            "min_tokens",
            f"min_tokens is {self.min_tokens}; it must be between 0 and max_tokens "
            f"({self.max_tokens})",
        )
        _require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed",
        )
        _require(
            all(self.stop),
            "stop",
            "stop holds an empty string; every stop string needs at least one character",
        )
        _require(
            self.seed is None or -(2**63) <= self.seed < 2**64,
            "seed",
            f"seed is {self.seed}; it must fit in 64 bits",
        )


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection that avalanches (Steele et al., OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(
    seeds: npt.NDArray[np.uint64],
    choices: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    trials: npt.NDArray[np.int64] | int = 0,
) -> npt.NDArray[np.float64]:
    """Draw one number in [0, 1) a row, as a pure function of (seed, choice, position, trial).

    A draw depends on nothing else: not on the batch, the chunking or a preemption, and a rejected
    speculative branch leaves no trace. All arguments are arrays of one length; so is the result.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = _mix(seeds.astype(np.uint64) + golden)
        for part in (choices, positions, np.broadcast_to(np.asarray(trials), positions.shape)):
            state = _mix(state + (part.astype(np.uint64) + np.uint64(1)) * golden)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
