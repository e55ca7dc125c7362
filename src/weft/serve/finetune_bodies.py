"""The bodies of the fine-tuning API, and how every setting that is left open is resolved, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, StringConstraints

from weft.base.errors import ConfigError, InvalidRequestError, UnsupportedError
from weft.engine.finetune import (
    FinetuneJobSpec,
    LossNormalization,
    OptimizerName,
    OptimizerSpec,
    ScheduleName,
    TrainingSample,
)
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.graph.pruning import Remat
from weft.serve.finetune_data import OverlongSamples
from weft.serve.protocol import MAX_NAME_CHARS, Body, Name, Number, without_nul

BASE_LEARNING_RATE = 2e-4
"""What `learning_rate_multiplier` multiplies."""
AUTO_EPOCHS = 3
AUTO_RANK = 16
AUTO_IA3_TARGETS = ("k_proj", "v_proj", "down_proj")
AUTO_IA3_INPUTS = ("down_proj",)
"""PEFT's own choice for Llama-like models."""
AUTO_BATCH_SHARE = 0.002
MAX_AUTO_BATCH = 256
"""`batch_size: "auto"` is 0.2 % of the samples, within [1, 256], as OpenAI has it."""
MAX_EPOCHS = 1000
MAX_BATCH = 4096
MAX_SUFFIX_CHARS = 64
_MAX_METADATA = 16
_SPEC_NAMES = {"r": "rank"}
"""Of the API's names, those that `AdapterSpec` calls otherwise."""
_SUPPORTED_METHODS = "supported is supervised"

Auto = Literal["auto"]
Suffix = Annotated[
    str, StringConstraints(max_length=MAX_SUFFIX_CHARS, pattern=r"^[A-Za-z0-9._-]*$")
]
MetadataKey = Annotated[str, StringConstraints(max_length=64), AfterValidator(without_nul)]
MetadataValue = Annotated[str, StringConstraints(max_length=512), AfterValidator(without_nul)]
Targets = Name | Annotated[list[Name], Field(max_length=256)] | None
"""Names, a regular expression, or `all-linear`."""


class HyperparametersBody(Body):
    """`hyperparameters`, at the top or within the method."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=MAX_EPOCHS)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=MAX_BATCH)] | None = None
    learning_rate_multiplier: Auto | Annotated[Number, Field(gt=0)] | None = None


class SupervisedBody(Body):
    """`method.supervised`."""

    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    """`method`."""

    type: Name
    supervised: SupervisedBody | None = None
    dpo: JsonValue = None
    reinforcement: JsonValue = None


class LoraBody(Body):
    """`weft.lora`; the names are PEFT's."""

    r: int | None = None
    alpha: Number | None = None
    dropout: Number | None = None
    target_modules: Targets = None


class Ia3Body(Body):
    """`weft.ia3`; the names are PEFT's."""

    target_modules: Targets = None
    feedforward_modules: Targets = None


class BottleneckBody(Body):
    """`weft.bottleneck`: behind the attention and the feed-forward sub-layers."""

    r: int | None = None
    target_modules: Targets = None
    activation: Name | None = None


class OptimizerBody(Body):
    """`weft.optimizer`."""

    name: Name | None = None
    lr: Number | None = None
    weight_decay: Number | None = None


class WeftBody(Body):
    """`weft`: what OpenAI's API has no words for."""

    lora: LoraBody | None = None
    """At most one of the three adapters; without any, LoRA."""
    ia3: Ia3Body | None = None
    bottleneck: BottleneckBody | None = None
    optimizer: OptimizerBody | None = None
    schedule: Name | None = None
    num_warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    max_grad_norm: Number | None = None
    loss_normalization: Name | None = None
    overlong_samples: Name | None = None
    max_sample_tokens: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = None
    remat: Name | None = None


class JobBody(Body):
    """`POST /v1/fine_tuning/jobs`."""

    model: Name
    training_file: Name
    validation_file: Name | None = None
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: (
        Annotated[dict[MetadataKey, MetadataValue], Field(max_length=_MAX_METADATA)] | None
    ) = None
    integrations: list[JsonValue] | None = None
    weft: WeftBody | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSettings:
    """Every setting of a job, none of them open; what the API echoes."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    kind: str
    adapter_fields: dict[str, Any]
    """As `weft.lora`, `weft.ia3` or `weft.bottleneck` shows them, all of them set."""
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    num_warmup_steps: int
    max_grad_norm: float | None
    loss_normalization: str
    overlong_samples: str
    max_sample_tokens: int
    remat: str = Remat.PRUNED.value

    def adapter(self) -> AdapterSpec:
        """The adapter to train; raises ConfigError where a number is out of its range."""
        fields: dict[str, Any] = {
            _SPEC_NAMES.get(name, name): value for name, value in self.adapter_fields.items()
        }
        return AdapterSpec(kind=AdapterKind(self.kind), **fields)

    def optimizer_spec(self) -> OptimizerSpec:
        """The optimizer; raises ConfigError where a number is out of its range."""
        return OptimizerSpec(
            name=_choice(OptimizerName, self.optimizer, "weft.optimizer.name"),
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule=_choice(ScheduleName, self.schedule, "weft.schedule"),
            num_warmup_steps=self.num_warmup_steps,
            max_grad_norm=self.max_grad_norm,
        )

    def check(self) -> None:
        """Raise InvalidRequestError where a setting is out of its range or unknown."""
        adapter = f"weft.{self.kind}"
        for param, work in ((adapter, self.adapter), ("weft.optimizer", self.optimizer_spec)):
            try:
                work()
            except ConfigError as error:
                raise InvalidRequestError(str(error), param) from None
        _choice(LossNormalization, self.loss_normalization, "weft.loss_normalization")
        _choice(OverlongSamples, self.overlong_samples, "weft.overlong_samples")
        _choice(Remat, self.remat, "weft.remat")

    def spec(
        self,
        job_id: str,
        *,
        samples: tuple[TrainingSample, ...],
        validation: tuple[TrainingSample, ...] = (),
        **rest: Any,
    ) -> FinetuneJobSpec:
        """The job for the engine."""
        return FinetuneJobSpec(
            id=job_id,
            adapter=self.adapter(),
            samples=samples,
            validation=validation,
            num_epochs=self.n_epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer_spec(),
            loss_normalization=LossNormalization(self.loss_normalization),
            remat=Remat(self.remat),
            **rest,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the store."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> JobSettings:
        """What `to_json` gave."""
        return cls(**fields)

    def hyperparameters(self) -> dict[str, int | float]:
        """As OpenAI's objects show them."""
        return {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }

    def weft(self) -> dict[str, Any]:
        """As `weft` shows them."""
        return {
            self.kind: dict(self.adapter_fields),
            "optimizer": {
                "name": self.optimizer,
                "lr": self.lr,
                "weight_decay": self.weight_decay,
            },
            "schedule": self.schedule,
            "num_warmup_steps": self.num_warmup_steps,
            "max_grad_norm": self.max_grad_norm,
            "loss_normalization": self.loss_normalization,
            "overlong_samples": self.overlong_samples,
            "max_sample_tokens": self.max_sample_tokens,
            "remat": self.remat,
        }


def resolve_settings(
    body: JobBody, *, num_samples: int, max_model_len: int, earlier: JobSettings | None = None
) -> JobSettings:
    """Fill in what a body leaves open.

    `earlier` is of the job whose result this one starts from: it keeps that adapter's shape.

    Raises:
        InvalidRequestError: a setting is out of its range, or given twice.
        UnsupportedError: a method or an integration that Weft does not have.
    """
    given = _hyperparameters(body)
    weft = body.weft or WeftBody()
    optimizer = weft.optimizer or OptimizerBody()
    multiplier = _set(given.learning_rate_multiplier)
    if multiplier is not None and optimizer.lr is not None:
        raise InvalidRequestError(
            "learning_rate_multiplier and weft.optimizer.lr are both given; give one",
            "learning_rate_multiplier",
        )
    lr = optimizer.lr if optimizer.lr is not None else (multiplier or 1.0) * BASE_LEARNING_RATE
    length = weft.max_sample_tokens or max_model_len
    if length > max_model_len:
        raise InvalidRequestError(
            f"weft.max_sample_tokens is {length}; this model's context holds {max_model_len}",
            "weft.max_sample_tokens",
        )
    kind, fields = _adapter(weft, earlier)
    auto_batch = max(1, min(MAX_AUTO_BATCH, round(num_samples * AUTO_BATCH_SHARE)))
    settings = JobSettings(
        n_epochs=_set(given.n_epochs) or AUTO_EPOCHS,
        batch_size=_set(given.batch_size) or auto_batch,
        learning_rate_multiplier=lr / BASE_LEARNING_RATE if multiplier is None else multiplier,
        kind=kind.value,
        adapter_fields=fields,
        optimizer=optimizer.name or OptimizerName.ADAMW.value,
        lr=lr,
        weight_decay=optimizer.weight_decay or 0.0,
        schedule=weft.schedule or ScheduleName.CONSTANT.value,
        num_warmup_steps=weft.num_warmup_steps or 0,
        max_grad_norm=weft.max_grad_norm,
        loss_normalization=weft.loss_normalization or LossNormalization.TOKEN.value,
        overlong_samples=weft.overlong_samples or OverlongSamples.REFUSE.value,
        max_sample_tokens=length,
        remat=weft.remat or Remat.PRUNED.value,
    )
    settings.check()
    return settings


def _adapter(weft: WeftBody, earlier: JobSettings | None) -> tuple[AdapterKind, dict[str, Any]]:
    """Which adapter is asked for, and every setting of it under the names of the API."""
    given = {
        AdapterKind.LORA: weft.lora,
        AdapterKind.IA3: weft.ia3,
        AdapterKind.BOTTLENECK: weft.bottleneck,
    }
    asked = [kind for kind, body in given.items() if body is not None]
    if len(asked) > 1:
        names = " and ".join(f"weft.{kind}" for kind in asked)
        raise InvalidRequestError(f"{names} are given; give one adapter", f"weft.{asked[1]}")
    first = AdapterKind.LORA if earlier is None else AdapterKind(earlier.kind)
    kind = asked[0] if asked else first
    body = given[kind] or LoraBody()
    # Not `model_dump`: unknown keys that a server was told to ignore are no settings.
    asked_for = {name: getattr(body, name) for name in type(body).model_fields}
    fields = {name: value for name, value in asked_for.items() if value is not None}
    if earlier is not None:
        return kind, _kept(kind, fields, earlier)
    match kind:
        case AdapterKind.LORA:
            rank = fields.get("r", AUTO_RANK)
            defaults = {"r": rank, "alpha": float(2 * rank), "dropout": 0.0}
            defaults["target_modules"] = "all-linear"
        case AdapterKind.IA3:
            defaults = {
                "target_modules": list(AUTO_IA3_TARGETS),
                "feedforward_modules": list(AUTO_IA3_INPUTS),
            }
        case AdapterKind.BOTTLENECK:
            defaults = {"r": AUTO_RANK, "target_modules": "all-linear", "activation": "relu"}
    return kind, defaults | fields


def _kept(kind: AdapterKind, fields: dict[str, Any], earlier: JobSettings) -> dict[str, Any]:
    """The adapter that a job starts from, but for its dropout; anything else would be another."""
    param = f"weft.{kind}"
    if kind != earlier.kind:
        raise InvalidRequestError(
            f"{param} is given, but the model that the job starts from has weft.{earlier.kind}; "
            "leave it out",
            param,
        )
    for name, value in fields.items():
        before = earlier.adapter_fields.get(name)
        if name != "dropout" and _as_set(value) != _as_set(before):
            raise InvalidRequestError(
                f"{param}.{name} is {value!r}, but the model that the job starts from has "
                f"{before!r}; leave it out",
                param,
            )
    return earlier.adapter_fields | fields


def _as_set(value: Any) -> Any:
    return set(value) if isinstance(value, list) else value


def _hyperparameters(body: JobBody) -> HyperparametersBody:
    if body.integrations:
        raise UnsupportedError("integrations are not supported; leave them out")
    method = body.method
    if method is None:
        return body.hyperparameters or HyperparametersBody()
    if method.type != "supervised":
        raise UnsupportedError(f"method {method.type!r} is not supported; {_SUPPORTED_METHODS}")
    for name in ("dpo", "reinforcement"):
        if getattr(method, name) is not None:
            raise UnsupportedError(f"method.{name} is not supported; {_SUPPORTED_METHODS}")
    inner = None if method.supervised is None else method.supervised.hyperparameters
    if inner is not None and body.hyperparameters is not None and inner != body.hyperparameters:
        raise InvalidRequestError(
            "hyperparameters and method.supervised.hyperparameters differ; give one of them",
            "hyperparameters",
        )
    return inner or body.hyperparameters or HyperparametersBody()


def _set(value: Any) -> Any:
    """A value that is given; "auto" is not."""
    return None if value == "auto" else value


def _choice(kind: Any, value: str, param: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise InvalidRequestError(
            f"{param} is {value[:MAX_NAME_CHARS]!r}; it must be one of {known}", param
        ) from None
