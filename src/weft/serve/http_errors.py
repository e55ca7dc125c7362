"""Every error over HTTP is OpenAI's error object, whatever raised it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from starlette.responses import Response

from weft.base.errors import (
    AdapterLoadError,
    EngineDeadError,
    InvalidRequestError,
    OutOfMemoryError,
    QueueFullError,
    UnsupportedError,
    WeftError,
)
from weft.serve.records import StorageError
from weft.serve.responses import encode_json

_INTERNAL_ERROR = "internal_error"
_STATUSES = {"model_not_found": 404, "not_found": 404, "in_use": 409, "wrong_state": 409}
"""Of refusals, by their codes; 400 for all others."""


class GenerationFailedError(WeftError, RuntimeError):
    """A request whose logits were not finite; its neighbours are well."""


class DrainingError(WeftError, RuntimeError):
    """The server is shutting down: it finishes what runs and takes nothing new."""


@dataclass(kw_only=True, eq=False)
class HttpError(Exception):
    """Status and OpenAI's error object."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """As a whole response."""
        return Response(
            encode_json(self.body()),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def as_http_error(error: BaseException) -> HttpError:
    """What a client hears of an error; anything unexpected is a 500 without its insides."""
    match error:
        case HttpError():
            return error
        case InvalidRequestError():
            status = _STATUSES.get(error.code or "", 400)
            return HttpError(
                status=status, message=error.message, param=error.param, code=error.code
            )
        case AdapterLoadError():
            return HttpError(status=400, message=str(error), code="invalid_adapter")
        case OutOfMemoryError():
            return HttpError(status=400, message=str(error), code="out_of_memory")
        case UnsupportedError():
            return HttpError(status=400, message=str(error), code="unsupported")
        case StorageError():
            return HttpError(
                status=507, message=str(error), type="server_error", code="insufficient_storage"
            )
        case QueueFullError():
            return HttpError(
                status=429,
                message=error.message,
                type="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(max(1, math.ceil(error.retry_after_s)))},
            )
        case EngineDeadError():
            return _unavailable(str(error), "engine_dead")
        case DrainingError():
            return _unavailable(str(error), "draining")
        case GenerationFailedError():
            return HttpError(
                status=500, message=str(error), type="server_error", code="generation_failed"
            )
        case _:
            return HttpError(
                status=500,
                message="the server failed on this request; its log says why",
                type="server_error",
                code=_INTERNAL_ERROR,
            )


def is_unexpected(answer: HttpError) -> bool:
    """Whether an answer hides an error that nobody foresaw, which a log must show."""
    return answer.code == _INTERNAL_ERROR


def _unavailable(message: str, code: str) -> HttpError:
    return HttpError(
        status=503,
        message=message,
        type="service_unavailable_error",
        code=code,
        headers={"Retry-After": "5"},
    )
