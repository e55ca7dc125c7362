"""The OpenAI-compatible HTTP API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

import weft
from weft.base.errors import ConfigError, EngineDeadError, InvalidRequestError, QueueFullError
from weft.model.tokenizer import Tokenizer
from weft.serve.adapter_api import (
    AdapterApi,
    AdapterConfig,
    LoadAdapterBody,
    UnloadAdapterBody,
)
from weft.serve.api_keys import ApiKeys, tenant_of
from weft.serve.chat import ChatWriter
from weft.serve.completions import CompletionWriter
from weft.serve.engine_client import EngineClient
from weft.serve.event_stream import EventStream, hang_up_calls
from weft.serve.finetune_api import FinetuneApi
from weft.serve.finetune_bodies import JobBody
from weft.serve.finetune_service import FinetuneService
from weft.serve.gate import Gate
from weft.serve.generation import ClientGoneError, Generation
from weft.serve.http_errors import DrainingError, HttpError, as_http_error, is_unexpected
from weft.serve.metrics import ServingMetrics
from weft.serve.protocol import (
    MAX_NAME_CHARS,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    first_problem,
)
from weft.serve.request_factory import Prepared, RequestFactory, RequestLimits
from weft.serve.responses import encode_json
from weft.serve.served_models import Resolved, ServedModels

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BODIES: tuple[type[Body], ...] = (
    CompletionBody,
    ChatBody,
    TokenizeBody,
    DetokenizeBody,
    JobBody,
    LoadAdapterBody,
    UnloadAdapterBody,
)
_SCHEMAS = "#/components/schemas/"
_INLINE_TOKENS = 4096
_MAX_UNKNOWN_NAMED = 10
_MAX_UNKNOWN_CHARS = 80

logger = logging.getLogger("weft.server")
B = TypeVar("B", bound=Body)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """How the API answers.

    Raises:
        ConfigError: `max_waiting` is negative.
    """

    model_names: tuple[str, ...]
    """Names under which the model is served; answers carry the first."""
    keys: ApiKeys
    limits: RequestLimits = field(default_factory=RequestLimits)
    max_waiting: int = 1024
    """Answers that may wait beyond those that the engine can run at once."""
    allow_unknown_params: bool = False
    adapters: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting is {self.max_waiting}; it must be at least 0")


class Api:
    """Handlers and the little state that they share."""

    def __init__(
        self,
        config: ApiConfig,
        client: EngineClient,
        tokenizer: Tokenizer,
        *,
        models: ServedModels | None = None,
        finetuning: FinetuneService | None = None,
    ) -> None:
        self.config = config
        self.served_models = models or ServedModels(config.model_names, client)
        self._finetuning = finetuning
        self.client = client
        self.tokenizer = tokenizer
        self.is_draining = False
        """Set by the server's owner: nothing new is taken."""
        self.metrics = ServingMetrics(
            client, model_name=config.model_names[0], finetuning=finetuning
        )
        client.observer = self.metrics
        self._factory = RequestFactory(
            tokenizer=tokenizer,
            info=client.info,
            sampling_defaults=client.info.sampling_defaults,
            limits=config.limits,
        )
        self._fingerprint = f"weft-{weft.__version__}"
        self._max_live = client.info.max_num_seqs + config.max_waiting
        self._warned: set[str] = set()

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(
            title="Weft", version=weft.__version__, redoc_url=None, redirect_slashes=False
        )
        app.add_middleware(
            Gate,
            keys=self.config.keys,
            max_body_bytes=self.config.limits.max_body_bytes,
            max_file_bytes=self.config.limits.max_file_bytes,
        )
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(Exception, _on_error)
        for kind in (HttpError, weft.WeftError):
            app.add_exception_handler(kind, _on_error)
        self._add_routes(app)
        app.openapi = lambda: _openapi(app)
        return app

    # ---- generation ----

    async def completions(self, request: Request) -> Response:
        """Complete one or several prompts."""
        self._check_open()
        body = await self._read(request, CompletionBody)
        tenant = tenant_of(request)
        model = await self._resolve(body.model, tenant.name)
        prepared = await self._factory.completions(body, tenant, adapter=model.adapter)
        generation = self._generate(prepared, is_streamed=bool(body.stream))
        writer = CompletionWriter(
            body,
            generation,
            self.tokenizer,
            model=model.name,
            fingerprint=self._fingerprint,
        )
        return await self._answer(request, writer, generation, is_streamed=bool(body.stream))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        self._check_open()
        body = await self._read(request, ChatBody)
        tenant = tenant_of(request)
        model = await self._resolve(body.model, tenant.name)
        prepared = await self._factory.chat(body, tenant, adapter=model.adapter)
        generation = self._generate([prepared], is_streamed=bool(body.stream))
        writer = ChatWriter(
            body,
            generation,
            self.tokenizer,
            model=model.name,
            fingerprint=self._fingerprint,
        )
        return await self._answer(request, writer, generation, is_streamed=bool(body.stream))

    def _generate(self, prepared: Sequence[Prepared], *, is_streamed: bool) -> Generation:
        self._check_open()  # Reading and tokenising took a while.
        try:
            return Generation(
                self.client,
                self.tokenizer,
                prepared,
                is_streamed=is_streamed,
                max_live_choices=self._max_live,
            )
        except QueueFullError:
            self.metrics.rejected()
            raise

    async def _answer(
        self,
        request: Request,
        writer: CompletionWriter | ChatWriter,
        generation: Generation,
        *,
        is_streamed: bool,
    ) -> Response:
        if is_streamed:
            return EventStream(writer.events(), cancel=generation.abandon)
        try:
            async with hang_up_calls(request.receive, generation.abandon):
                return _json(await writer.whole())
        except ClientGoneError:
            return Response(status_code=499)  # Nobody reads it; logs know the number.
        finally:
            generation.cancel()

    # ---- tokens ----

    async def tokenize(self, request: Request) -> Response:
        """Text or conversation to token ids."""
        self._check_open()
        body = await self._read(request, TokenizeBody)
        await self._resolve(body.model, tenant_of(request).name)
        tokens = await self._factory.tokenize(body)
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": self.client.info.max_model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = await _beside(
                len(tokens), lambda: [self.tokenizer.token_text(token) for token in tokens]
            )
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        self._check_open()
        body = await self._read(request, DetokenizeBody)
        await self._resolve(body.model, tenant_of(request).name)
        try:
            tokens = self.tokenizer.check_ids(body.tokens, num_ids=self.client.info.vocab_size)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.message, "tokens", error.code) from None
        return _json({"prompt": self.tokenizer.decode(tokens, skip_special_tokens=False)})

    # ---- about the server ----

    async def models(self, request: Request) -> Response:
        """All names that are served to the caller."""
        self._check_open()
        cards = self.served_models.cards(tenant_of(request).name, self.client.info.max_model_len)
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request, model: str) -> Response:
        """One name."""
        self._check_open()
        tenant = tenant_of(request).name
        await self._resolve(model, tenant)
        return _json(self.served_models.card(model, tenant, self.client.info.max_model_len))

    async def delete_model(self, request: Request, model: str) -> Response:
        """Delete a fine-tuned model; requests that run keep it to their end."""
        self._check_open()
        tenant = tenant_of(request).name
        await self._resolve(model, tenant)
        if self._finetuning is None or not model.startswith("ft:"):
            raise InvalidRequestError(
                f"model {model!r} cannot be deleted; only fine-tuned models (ft:...) can", "model"
            )
        await self._finetuning.delete_adapter(tenant, model)
        return _json({"id": model, "object": "model", "deleted": True})

    async def health(self) -> Response:
        """200 while requests are taken, 503 otherwise."""
        self._check_open()
        return Response(status_code=200)

    async def version(self) -> Response:
        """The server's version."""
        return _json({"version": weft.__version__})

    async def prometheus(self) -> Response:
        """Prometheus' text format."""
        return Response(self.metrics.render(), media_type=METRICS_MEDIA_TYPE)

    # ---- pieces ----

    async def _resolve(self, name: str | None, tenant: str) -> Resolved:
        """What a request's model stands for; checkpoints are loaded when they are first asked for.

        Raises:
            InvalidRequestError: no such model is served to this tenant.
        """
        if self._finetuning is not None and name is not None:
            await self._finetuning.serve_checkpoint(tenant, name)
        return self.served_models.resolve(name, tenant)

    def _check_open(self) -> None:
        if self.client.death is not None:
            raise EngineDeadError(str(self.client.death))
        if self.is_draining:
            raise DrainingError("the server is shutting down; ask another one")

    async def _read(self, request: Request, kind: type[B]) -> B:
        try:
            body = kind.model_validate_json(await request.body())
        except ValidationError as error:
            message, param = first_problem(
                error.errors(include_url=False, include_context=False, include_input=False)
            )
            raise InvalidRequestError(message, param) from None
        self._check_unknown(body)
        return body

    def _check_unknown(self, body: Body) -> None:
        unknown = list(islice(body.unknown_keys(), _MAX_UNKNOWN_NAMED + 1))
        if not unknown:
            return
        names = ", ".join(map(_quote, unknown[:_MAX_UNKNOWN_NAMED]))
        names += ", ..." if len(unknown) > _MAX_UNKNOWN_NAMED else ""
        if not self.config.allow_unknown_params:
            raise InvalidRequestError(
                f"unknown parameter: {names}; see docs/reference/openai-parameters.md, or start "
                "the server with --allow-unknown-params",
                unknown[0][:MAX_NAME_CHARS].split(".")[0].split("[")[0],
                "unknown_parameter",
            )
        if names not in self._warned and len(self._warned) < 1000:
            self._warned.add(names)
            logger.warning("unknown parameters are ignored: %s", names)

    def _add_routes(self, app: FastAPI) -> None:
        posts = (
            ("/v1/completions", self.completions, CompletionBody),
            ("/v1/chat/completions", self.chat, ChatBody),
            ("/tokenize", self.tokenize, TokenizeBody),
            ("/detokenize", self.detokenize, DetokenizeBody),
        )
        for path, handler, kind in posts:
            schema = {"$ref": f"{_SCHEMAS}{kind.__name__}"}
            app.add_api_route(
                path,
                handler,
                methods=["POST"],
                response_class=Response,
                responses=_RESPONSES,
                openapi_extra={
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": schema}},
                    }
                },
            )
        gets = (
            ("/v1/models", self.models),
            ("/v1/models/{model:path}", self.model),
            ("/health", self.health),
            ("/version", self.version),
            ("/metrics", self.prometheus),
        )
        for path, handler in gets:
            app.add_api_route(path, handler, methods=["GET"], response_class=Response)
        app.add_api_route(
            "/v1/models/{model:path}",
            self.delete_model,
            methods=["DELETE"],
            response_class=Response,
        )
        if self._finetuning is not None:
            FinetuneApi(
                self._finetuning,
                read_job=lambda request: self._read(request, JobBody),
                check_open=self._check_open,
            ).add_routes(app)
        AdapterApi(
            self.config.adapters,
            self.served_models,
            read_load=lambda request: self._read(request, LoadAdapterBody),
            read_unload=lambda request: self._read(request, UnloadAdapterBody),
            check_open=self._check_open,
        ).add_routes(app)
        # Load balancers ask so.
        app.add_api_route("/health", self.health, methods=["HEAD"], include_in_schema=False)


_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be served as written."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "The model is not served."},
    413: {"description": "The body is too large."},
    429: {"description": "The queue is full."},
    503: {"description": "The server is draining, or its engine is gone."},
}


async def _beside(num_tokens: int, work: Callable[[], T]) -> T:
    """Do long work in a thread, so that other requests' streams flow on."""
    return work() if num_tokens <= _INLINE_TOKENS else await asyncio.to_thread(work)


def _quote(name: str) -> str:
    """A name that a stranger chose, for messages and logs: printable and short."""
    if len(name) <= _MAX_UNKNOWN_CHARS:
        return repr(name)
    return f"{name[:_MAX_UNKNOWN_CHARS]!r}..."


def _json(value: Any) -> Response:
    return Response(encode_json(value), media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    answer = as_http_error(error)
    if is_unexpected(answer):
        logger.error("request %s failed", request.state.request_id, exc_info=error)
    return answer.response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    where = f"{request.method} {request.url.path}"
    messages = {
        404: f"there is no {where} here",
        405: f"{where} is not possible; allowed: {headers.get('allow', headers.get('Allow', ''))}",
    }
    return HttpError(
        status=status,
        message=messages.get(status, str(getattr(error, "detail", error))),
        type="invalid_request_error" if status < 500 else "server_error",
        code={404: "not_found", 405: "method_not_allowed"}.get(status),
        headers=headers,
    ).response()


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        _, definitions = models_json_schema(
            [(kind, "validation") for kind in _BODIES], ref_template=_SCHEMAS + "{model}"
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
