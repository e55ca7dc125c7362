"""The names that requests may ask for: the base model's, and those of adapters on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from weft.base.errors import InvalidRequestError
from weft.engine.batch import AdapterRef


class AdapterLoader(Protocol):
    """What loads adapters into the engine."""

    async def load_adapter(self, ref: AdapterRef, path: str) -> None:
        """Read an adapter directory; refused where it is of another base or malformed."""
        ...

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Give its memory back once no request uses it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAdapter:
    """An adapter under a name."""

    name: str
    ref: AdapterRef
    """The version that new requests get."""
    path: str
    tenant: str | None = None
    """Whose it is; None: everyone's."""
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """What a request's `model` stands for."""

    name: str
    """To be echoed in the answer."""
    adapter: AdapterRef | None = None


class ServedModels:
    """Resolves names; one for a server. Another tenant's adapter does not exist."""

    def __init__(self, base_names: tuple[str, ...], loader: AdapterLoader) -> None:
        self.base_names = base_names
        self._loader = loader
        self._adapters: dict[tuple[str | None, str], ServedAdapter] = {}
        """By tenant and name: what one tenant calls its adapters is no other's business."""
        self._num_versions: dict[str, int] = {}
        self._created = int(time.time())

    def resolve(self, name: str | None, tenant: str) -> Resolved:
        """The model of a name; None stands for the base.

        Raises:
            InvalidRequestError: no such model is served to this tenant.
        """
        if name is None or name in self.base_names:
            return Resolved(name=self.base_names[0])
        adapter = self.find(name, tenant)
        if adapter is None:
            raise InvalidRequestError(
                f"model {name!r} is not served here; served: {', '.join(self._names(tenant))}",
                "model",
                "model_not_found",
            )
        return Resolved(name=name, adapter=adapter.ref)

    async def add(
        self,
        name: str,
        path: str,
        *,
        id: str | None = None,
        tenant: str | None = None,
        published: AdapterRef | None = None,
    ) -> ServedAdapter:
        """Serve an adapter under a name from now on; the tenant's of that name gets a new version.

        `published` is a version that the engine holds already.

        Raises:
            WeftError: the engine refuses the adapter.
        """
        if name in self.base_names:
            raise InvalidRequestError(f"{name!r} is the base model's name; choose another", "name")
        previous = self._adapters.get((tenant, name))
        ref = published
        if ref is None:
            # U+0000 stands in no name, so that no two tenants' names run into one.
            id = id or (name if tenant is None else f"{tenant}\0{name}")
            version = self._num_versions.get(id, 0) + 1
            ref = AdapterRef(id=id, version=version)
            await self._loader.load_adapter(ref, path)
        self._num_versions[ref.id] = max(self._num_versions.get(ref.id, 0), ref.version)
        served = ServedAdapter(name=name, ref=ref, path=path, tenant=tenant)
        self._adapters[tenant, name] = served
        if previous is not None:
            await self._loader.unload_adapter(previous.ref)
        return served

    async def remove(self, name: str, tenant: str | None) -> None:
        """Serve a tenant's adapter no more; running requests keep it to their end.

        Unknown names are ignored.
        """
        adapter = self._adapters.pop((tenant, name), None)
        if adapter is not None:
            await self._loader.unload_adapter(adapter.ref)

    def find(self, name: str, tenant: str) -> ServedAdapter | None:
        """The adapter that a tenant means by a name: its own, or everyone's."""
        return self._adapters.get((tenant, name)) or self._adapters.get((None, name))

    def cards(self, tenant: str, max_model_len: int) -> list[dict[str, Any]]:
        """Everything that a tenant may ask for, as OpenAI's `model` objects."""
        return [self.card(name, tenant, max_model_len) for name in self._names(tenant)]

    def card(self, name: str, tenant: str, max_model_len: int) -> dict[str, Any]:
        """One `model` object; raises as `resolve`."""
        self.resolve(name, tenant)
        adapter = self.find(name, tenant)
        return {
            "id": name,
            "object": "model",
            "created": self._created if adapter is None else adapter.created,
            "owned_by": "weft" if adapter is None or not adapter.tenant else adapter.tenant,
            "root": self.base_names[0],
            "parent": None if adapter is None else self.base_names[0],
            "max_model_len": max_model_len,
        }

    def _names(self, tenant: str) -> Iterator[str]:
        yield from self.base_names
        for owner, name in self._adapters:
            if owner in (None, tenant):
                yield name
