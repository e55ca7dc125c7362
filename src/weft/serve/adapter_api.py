"""Serving adapter directories: at the start by flag, later by vLLM's two routes.

The routes exist to those who started the server with a root for adapters, and read nothing outside
it, whatever symbolic links lie there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

from weft.base.errors import ConfigError, InvalidRequestError
from weft.serve.api_keys import ANYONE, tenant_of
from weft.serve.http_errors import HttpError
from weft.serve.pattern_check import check_directory_patterns
from weft.serve.protocol import Body, Name
from weft.serve.served_models import ServedModels


class LoadAdapterBody(Body):
    """Body of `/v1/load_lora_adapter`."""

    lora_name: Name
    lora_path: Name


class UnloadAdapterBody(Body):
    """Body of `/v1/unload_lora_adapter`."""

    lora_name: Name


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraModule:
    """An adapter that is served from the start."""

    name: str
    path: Path

    @staticmethod
    def parse(text: str) -> LoraModule:
        """`name=path`.

        Raises:
            ConfigError: it is something else, or no such directory is there.
        """
        name, found, path = text.partition("=")
        if not (name and found and path):
            raise ConfigError(f"--lora-modules {text!r}: give name=path")
        if not Path(path).is_dir():
            raise ConfigError(f"--lora-modules {text!r}: {path} is not a directory")
        return LoraModule(name=name, path=Path(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Which adapter directories a server may read.

    Raises:
        ConfigError: the root is no directory, or a name is given twice.
    """

    modules: tuple[LoraModule, ...] = ()
    root: Path | None = None
    """Directories below it may be loaded by request; None: none may."""

    def __post_init__(self) -> None:
        if self.root is not None and not self.root.is_dir():
            raise ConfigError(f"--adapter-root: {self.root} is not a directory")
        names = [module.name for module in self.modules]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--lora-modules names {name!r} twice")


async def serve_modules(models: ServedModels, modules: Sequence[LoraModule]) -> None:
    """Load the adapters that a server starts with; raises what the engine says of them."""
    for module in modules:
        await models.add(module.name, str(module.path.resolve()))


class AdapterApi:
    """The handlers; `read_load` and `read_unload` read and check bodies."""

    def __init__(
        self,
        config: AdapterConfig,
        models: ServedModels,
        *,
        read_load: Callable[[Request], Awaitable[LoadAdapterBody]],
        read_unload: Callable[[Request], Awaitable[UnloadAdapterBody]],
        check_open: Callable[[], None],
    ) -> None:
        self._root = None if config.root is None else config.root.resolve()
        self._models = models
        self._read_load = read_load
        self._read_unload = read_unload
        self._check_open = check_open

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        routes = (
            ("/v1/load_lora_adapter", self.load, LoadAdapterBody),
            ("/v1/unload_lora_adapter", self.unload, UnloadAdapterBody),
        )
        for path, handler, kind in routes:
            schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
            content = {"application/json": {"schema": schema}}
            app.add_api_route(
                path,
                handler,
                methods=["POST"],
                response_class=Response,
                openapi_extra={"requestBody": {"required": True, "content": content}},
            )

    async def load(self, request: Request) -> Response:
        """Serve an adapter directory below the root under a name, to the caller's tenant."""
        self._check_open()
        body = await self._read_load(request)
        root = self._checked_root()
        tenant = tenant_of(request).name
        if body.lora_name.startswith("ft:"):
            raise InvalidRequestError(
                f"lora_name {body.lora_name!r} begins with ft:, as fine-tuned models' names do; "
                "choose another",
                "lora_name",
            )
        if self._models.find(body.lora_name, tenant) is not None:
            raise InvalidRequestError(
                f"an adapter is served as {body.lora_name!r} already; unload it first, or choose "
                "another name",
                "lora_name",
            )
        path = self._below_root(root, body.lora_path)
        await check_directory_patterns(path)
        await self._models.add(body.lora_name, str(path), tenant=tenant)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Serve an adapter no more; requests that run keep it to their end."""
        self._check_open()
        body = await self._read_unload(request)
        self._checked_root()
        tenant = tenant_of(request).name
        served = self._models.find(body.lora_name, tenant)
        if served is None:
            raise InvalidRequestError(
                f"no adapter is served as {body.lora_name!r}", "lora_name", "model_not_found"
            )
        if body.lora_name.startswith("ft:"):
            raise InvalidRequestError(
                f"{body.lora_name!r} is a fine-tuned model; DELETE /v1/models/{body.lora_name} "
                "deletes it",
                "lora_name",
            )
        if served.tenant is None and tenant != ANYONE.name:
            raise HttpError(
                status=403,
                message=f"{body.lora_name!r} was loaded at the server's start, for all tenants; "
                "none of them can unload it",
                param="lora_name",
                code="forbidden",
            )
        await self._models.remove(body.lora_name, served.tenant)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _checked_root(self) -> Path:
        if self._root is None:
            raise HttpError(
                status=403,
                message="this server loads no adapters by request; start it with --adapter-root",
                code="forbidden",
            )
        return self._root

    @staticmethod
    def _below_root(root: Path, given: str) -> Path:
        """The directory that a path names; links and dots are followed before the check."""
        try:
            path = (root / given).resolve()
            is_directory = path.is_dir()
        except (OSError, ValueError):  # Too long a name, or a null byte in it.
            path, is_directory = root, False
        if path == root or not path.is_relative_to(root):
            raise HttpError(
                status=403,
                message="lora_path leaves the server's --adapter-root",
                param="lora_path",
                code="forbidden",
            )
        if not is_directory:
            raise InvalidRequestError(
                f"lora_path {given!r} names no directory below the server's --adapter-root",
                "lora_path",
            )
        # A weights file that is a link could still lead out.
        for file in path.iterdir():
            if not file.resolve().is_relative_to(root):
                raise HttpError(
                    status=403,
                    message=f"{file.name} in lora_path is a link that leaves --adapter-root",
                    param="lora_path",
                    code="forbidden",
                )
        return path
