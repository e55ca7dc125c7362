"""What earlier commands found out about a real server, kept in one file for the next."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class ServerState:
    """Capacities of one server by how each was found, and the speed of its job alone."""

    path: Path
    server: str
    profile_sha256: str
    """All of it is forgotten when the profile of step times is another one."""
    capacities_per_s: dict[str, float] = field(default_factory=dict)
    finetune_only_tokens_per_s: float | None = None

    @classmethod
    def read(cls, path: Path, server: str, profile: Path) -> ServerState:
        """What the file holds of this server with this profile; nothing where it holds none."""
        state = cls(
            path=path,
            server=server,
            profile_sha256=hashlib.sha256(profile.read_bytes()).hexdigest(),
        )
        known = _read(path).get(server, {})
        if known.get("profile_sha256") == state.profile_sha256:
            state.capacities_per_s = known["capacities_per_s"]
            state.finetune_only_tokens_per_s = known["finetune_only_tokens_per_s"]
        return state

    def write(self) -> None:
        """Put this server's part into the file, beside the other servers'."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = _read(self.path) | {
            self.server: {
                "profile_sha256": self.profile_sha256,
                "capacities_per_s": self.capacities_per_s,
                "finetune_only_tokens_per_s": self.finetune_only_tokens_per_s,
            }
        }
        self.path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
