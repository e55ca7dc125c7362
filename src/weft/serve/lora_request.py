"""Which adapter a prompt runs through, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from weft.base.errors import ConfigError, UnsupportedError
from weft.engine.batch import AdapterRef
from weft.serve.engine_core import EngineCore
from weft.serve.prompts import per_prompt


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter directory under a name and a number; loaded when it is first asked for.

    Any kind of adapter that Weft runs, not LoRA alone. Other weights under the same name need
    another number.

    Raises:
        ConfigError: the name or the path is empty, or the number is below 1.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str | PathLike[str]

    def __post_init__(self) -> None:
        if not self.lora_name or not str(self.lora_path):
            raise ConfigError(f"{self}: a name and a path are needed")
        if isinstance(self.lora_int_id, bool) or self.lora_int_id < 1:
            raise ConfigError(f"lora_int_id is {self.lora_int_id!r}; it must be 1 or more")

    @property
    def ref(self) -> AdapterRef:
        """The version that it names."""
        return AdapterRef(id=self.lora_name, version=self.lora_int_id)


class LoraRequests:
    """Turns what callers give into versions that the engine holds."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._paths: dict[AdapterRef, str] = {}

    def resolve(self, given: object, number: int) -> list[AdapterRef | None]:
        """A version, or None, for each of so many prompts; adapters seen first are loaded.

        `given` is None, one request or finetuning job's `adapter` for all, or a list with one a
        prompt.

        Raises:
            WeftError: the engine refuses an adapter, or `given` is something else.
        """
        if given is None or isinstance(given, LoRARequest | AdapterRef):
            return [self._one(given)] * number
        if not isinstance(given, list | tuple):
            raise UnsupportedError(
                f"lora_request is a {type(given).__name__}; it must be a LoRARequest, the "
                "`adapter` of a finetuning job, a list of these, or None"
            )
        kind = "a LoRARequest, the `adapter` of a finetuning job, or None"
        return [self._one(one) for one in per_prompt("lora_request", given, number, kind)]

    def _one(self, given: object) -> AdapterRef | None:
        if given is None or isinstance(given, AdapterRef):
            return given
        if not isinstance(given, LoRARequest):
            raise UnsupportedError(
                f"lora_request holds a {type(given).__name__}; it must hold LoRARequests"
            )
        ref, path = given.ref, str(given.lora_path)
        if not self._core.has_adapter(ref):
            self._core.load_adapter(ref, path)
            self._paths[ref] = path
        elif self._paths.get(ref, path) != path:
            raise ConfigError(
                f"adapter {ref.id!r} number {ref.version} was loaded from {self._paths[ref]}; "
                f"give {path} another lora_int_id"
            )
        return ref
