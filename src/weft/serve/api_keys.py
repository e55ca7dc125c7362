"""Who may ask: API keys, compared in constant time, each standing for a tenant."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request

from weft.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """On whose behalf a request runs."""

    name: str = ""
    """Prefix blocks are shared only within one tenant."""
    priority: int | None = None
    """The most urgent priority that its requests may have; None leaves it to them."""
    weight: float = 1.0
    """Its share of the finetuning tokens, relative to other tenants'."""


ANYONE = Tenant()
"""Every caller of a server without keys."""


def tenant_of(request: Request) -> Tenant:
    """On whose behalf an HTTP request runs, as the gate has found."""
    return getattr(request.state, "tenant", ANYONE)


class ApiKeys:
    """The keys that a server takes. Empty means that it takes everyone."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._tenants = [(_digest(key), tenant) for key, tenant in tenants.items()]

    @classmethod
    def load(cls, keys: Iterable[str], file: str | Path | None) -> ApiKeys:
        """Keys of the command line, and of a file.

        The file is JSON, `{key: tenant name}` or `{key: {"tenant": name, "priority": number,
        "weight": number}}`, or plain lines of one key each, which all belong to one tenant.

        Raises:
            ConfigError: the file cannot be read, or a key is empty.
        """
        tenants = dict.fromkeys(keys, ANYONE)
        if file is not None:
            tenants.update(_read(Path(file)))
        if "" in tenants:
            raise ConfigError("an API key is empty; give a key of at least one character")
        return cls(tenants)

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, authorization: str | None) -> Tenant | None:
        """The tenant of an `Authorization: Bearer KEY` header, or None.

        Takes the same time whichever key matches, or none: every digest is compared in full.
        """
        if not self._tenants:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found: Tenant | None = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, given):
                found = tenant
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(path: Path) -> dict[str, Tenant]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API key file {path} cannot be read: {error}") from error
    if text.lstrip().startswith(("[", '"')):
        raise ConfigError(
            f"the API key file {path} starts as a JSON list or string; it must be a JSON object "
            "from key to tenant, or plain lines of one key each"
        )
    if not text.lstrip().startswith("{"):
        lines = (line.strip() for line in text.splitlines())
        tenants = {line: ANYONE for line in lines if line and not line.startswith("#")}
    else:
        try:
            entries = json.loads(text, object_pairs_hook=partial(_object, path))
        except (ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the API key file {path} is not valid JSON: {error}") from error
        tenants = {key: _tenant(path, key, entry) for key, entry in entries.items()}
    if not tenants:
        raise ConfigError(f"the API key file {path} holds no key")
    return tenants


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two equal ones, one tenant would silently win."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ConfigError(f"{path}: the key that starts with {key[:4]!r} is there twice")
        entries[key] = value
    return entries


def _tenant(path: Path, key: str, entry: Any) -> Tenant:
    label = f"{path}: the key that starts with {key[:4]!r}"  # Never a whole key in a message.
    if isinstance(entry, str) and entry:
        return Tenant(name=entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("tenant"), str):
        raise ConfigError(f'{label} needs a tenant name, or {{"tenant": name, "priority": number}}')
    unknown = set(entry) - {"tenant", "priority", "weight"}
    if unknown:
        raise ConfigError(f"{label} has unknown settings: {', '.join(sorted(unknown))}")
    priority = entry.get("priority")
    if priority is not None and (not isinstance(priority, int) or isinstance(priority, bool)):
        raise ConfigError(f"{label} has priority {priority!r}; a whole number is needed")
    weight = entry.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < 1e6:
        raise ConfigError(f"{label} has weight {weight!r}; a positive number is needed")
    return Tenant(name=entry["tenant"], priority=priority, weight=float(weight))
