"""The only place that knows both our errors and HTTP. Every error's body is OpenAI's:
`{"error": {"message", "type", "param", "code"}}`, so that the official clients show the reason.

What the client retries (408, 409, 429, 5xx) is chosen with care: a wrong state is 400, since asking again cannot help,
and a 409, or a 429 for a quota, tells the official client not to.
A rejected value is never echoed: it may be what JSON cannot hold, or a secret.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jobs.db import UNREACHABLE
from jobs.errors import (
    BusyError,
    ConflictError,
    FileDamagedError,
    InvalidRequestError,
    InvalidStateError,
    JobsError,
    NotFoundError,
    QuotaError,
    StorageError,
)

# Seconds: a restart of Postgres takes 0.1 to 2 s; the official client retries after as long as this says.
_RETRY_AFTER_S = 2
# A key of the request's body is named in the error; one that is longer was not written for people.
_MAX_NAME_CHARS = 64

_STATUS: dict[type[JobsError], int] = {
    NotFoundError: 404,
    InvalidRequestError: 400,
    InvalidStateError: 400,
    ConflictError: 409,
    BusyError: 429,
    QuotaError: 429,
    StorageError: 503,
    FileDamagedError: 500,
}
_STATUS_BY_CODE = {"file_too_large": 413, "part_too_large": 413}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}

# A full disk, or a full share of it.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

# Where FastAPI found a value: the first part of the place of an error of its own, not of a body's.
_SOURCES = frozenset({"query", "path", "header"})

log = structlog.get_logger(__name__)


class ApiError(Exception):
    """An error of HTTP itself, raised where there is no domain error to map."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}
        self.details = details or {}


def unauthenticated(message: str, *, code: str = "invalid_api_key") -> ApiError:
    """401: no key, or one that is not valid."""
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


def out_of_scope(scope: str) -> ApiError:
    """403: the key may do other things, but not this."""
    message = f"This API key lacks the scope {scope}: ask whoever administers your organization for one that has it."
    return ApiError(403, message, code="insufficient_scope", details={"scope": scope})


def too_many_requests(message: str, headers: Mapping[str, str]) -> ApiError:
    """429: too often; the headers say when to come again."""
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)


def forbidden(message: str, *, code: str) -> ApiError:
    """403: the caller is known and may not do this."""
    return ApiError(403, message, code=code)


def too_large(limit_bytes: int) -> ApiError:
    """413: the body is larger than this route takes. The rest of it is not read, so the connection ends."""
    message = f"The request's body is larger than {limit_bytes // 2**20} MiB."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def error_response(error: ApiError) -> Response:
    """The response that tells an error."""
    if error.status >= 500:
        kind = "server_error"
    else:
        kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    if error.code == QuotaError.code:
        kind = QuotaError.code  # OpenAI's type for it has the same name
    body = {
        "error": {**error.details, "message": error.message, "type": kind, "param": error.param, "code": error.code}
    }
    return Response(orjson.dumps(body), error.status, dict(error.headers), media_type="application/json")


def install(app: FastAPI) -> None:
    """Register the handlers that turn every exception into OpenAI's error body."""
    app.exception_handler(ApiError)(_handle_api_error)
    app.exception_handler(JobsError)(_handle_jobs_error)
    app.exception_handler(RequestValidationError)(_handle_validation_error)
    app.exception_handler(HTTPException)(_handle_http_exception)
    app.exception_handler(ClientDisconnect)(_handle_disconnect)
    for unreachable in UNREACHABLE:
        app.exception_handler(unreachable)(_handle_unreachable_database)
    app.exception_handler(OSError)(_handle_os_error)
    app.exception_handler(Exception)(_handle_unexpected)


def describe_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as a sentence, its place as a dotted name; how many more there are."""
    first = errors[0]
    place = (
        first["loc"][1:] if first["loc"] and first["loc"][0] in {"body", "query", "path", "header"} else first["loc"]
    )
    param = ".".join(str(part) for part in place)[:_MAX_NAME_CHARS] or None
    match first["type"]:
        case "extra_forbidden":
            message, code = f"Unknown key: {param!r}.", "unknown_parameter"
        case "missing":
            message, code = f"Missing required key: {param!r}.", "missing_required_parameter"
        case _:
            reason = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
            message, code = f"Invalid value for {param!r}: {reason}.", "invalid_value"
    if len(errors) > 1:
        message += f" ({len(errors) - 1} more)"
    return ApiError(400, message, code=code, param=param)


def _handle_api_error(_request: Request, error: ApiError) -> Response:
    return error_response(error)


def _handle_jobs_error(_request: Request, error: JobsError) -> Response:
    kind = next(kind for kind in type(error).__mro__ if kind in _STATUS)
    status = _STATUS_BY_CODE.get(error.code) or _STATUS[kind]
    is_final = status == 409 or isinstance(error, QuotaError | FileDamagedError)
    headers = {"x-should-retry": "false"} if is_final else {}
    if isinstance(error, StorageError):
        headers = {"Retry-After": str(_RETRY_AFTER_S)}
    return error_response(
        ApiError(status, error.message, code=error.code, param=error.param, headers=headers, details=error.details)
    )


def _handle_validation_error(_request: Request, error: RequestValidationError) -> Response:
    return error_response(describe_validation(error.errors()))


def _handle_http_exception(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}"
    messages = {404: f"No such endpoint: {where}", 405: f"Not allowed here: {where}"}
    message = messages.get(error.status_code, str(error.detail))
    code = _CODES.get(error.status_code, "invalid_request")
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


def _handle_disconnect(_request: Request, _error: ClientDisconnect) -> Response:
    # Nobody reads it; it only keeps a client that left in the middle of its body from looking like our mistake.
    return error_response(ApiError(400, "The client left before its body had arrived.", code="request_aborted"))


def _handle_unreachable_database(_request: Request, error: Exception) -> Response:
    log.warning("database_unreachable", error=str(error).splitlines()[0])
    message = "The database does not answer; nothing is lost, please try again."
    headers = {"Retry-After": str(_RETRY_AFTER_S)}
    return error_response(ApiError(503, message, code="database_unavailable", headers=headers))


def _handle_os_error(_request: Request, error: OSError) -> Response:
    if error.errno not in _NO_ROOM:
        raise error
    log.error("disk_full", error=str(error))
    message = "The server's disk is full, and the request changed nothing: whoever runs the server must make room."
    # The official clients send again whatever got a 5xx, unless they are told not to.
    return error_response(ApiError(507, message, code="disk_full", headers={"x-should-retry": "false"}))


def _handle_unexpected(request: Request, _error: Exception) -> Response:
    """Starlette raises the error again after this response, so that its traceback is logged; the caller gets none.

    This runs outside our middleware, so the request's id is set here.
    """
    request_id = getattr(request.state, "request_id", "unknown")
    message = f"The server made a mistake; its log tells more under {request_id}."
    return error_response(ApiError(500, message, code="server_error", headers={"x-request-id": request_id}))
