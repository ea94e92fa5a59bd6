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
from starlette.routing import Match, Route

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
_SHOULD = "Input should be "  # how most of pydantic's reasons begin

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


def too_large(limit_bytes: int, *, advice: str = "") -> ApiError:
    """413: the body is larger than this route takes. The rest of it is not read, so the connection ends."""
    message = f"The request's body is larger than {limit_bytes // 2**20} MiB{advice}."
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


def describe_validation(errors: Sequence[Mapping[str, Any]], body: Mapping[str, Any] | None = None) -> ApiError:
    """The first of pydantic's errors as a sentence, its place as a dotted name; how many more there are. `body`: what
    was read, where it was one; of a query there is none."""
    faults = [(_place(error, body), error) for error in errors]
    place, first = faults[0]
    # Of a value that may be of several kinds each kind says why it is not that one: the one that got furthest is meant.
    place, first = next((fault for fault in faults if fault[0].startswith(f"{place}.")), (place, first))
    param = place[:_MAX_NAME_CHARS] or None
    match first["type"]:
        case "extra_forbidden":
            message, code = f"Unknown key: {param!r}.", "unknown_parameter"
        case "missing":
            message, code = f"Missing required key: {param!r}.", "missing_required_parameter"
        case _:
            reasons = [_reason(error) for found, error in faults if found == place]
            message, code = f"Invalid value for {param!r}: {_join(reasons)}.", "invalid_value"
    others = {found for found, _ in faults if found != place and not place.startswith(f"{found}.")}
    if others:
        message += f" ({len(others)} more)"
    return ApiError(400, message, code=code, param=param)


def _place(error: Mapping[str, Any], body: Mapping[str, Any] | None) -> str:
    """The dotted name of a value. What is no key of the body is left out: pydantic names there which kind of value it
    had tried (`lomo.devices.literal[1]`)."""
    if body is None:
        return ".".join(str(part) for part in error["loc"] if part not in _SOURCES)
    names: list[str] = []
    value: Any = body
    for part in error["loc"]:
        if isinstance(value, Mapping):
            is_key = part in value or (error["type"] == "missing" and part == error["loc"][-1])
            value = value.get(part) if is_key else value
        else:
            is_key = isinstance(value, list) and isinstance(part, int)
            value = value[part] if is_key else value
        if is_key:
            names.append(str(part))
    return ".".join(names)


def _reason(error: Mapping[str, Any]) -> str:
    """Why a value is wrong, without the name of a class of ours."""
    if error["type"] in {"model_type", "dict_type"}:
        return f"{_SHOULD}an object"
    return str(error["msg"]).removeprefix("Value error, ").rstrip(".")


def _join(reasons: Sequence[str]) -> str:
    """The reasons of all kinds that a value may be of; where it is of one of them, that one's reason."""
    of_its_kind = [reason for reason in reasons if not reason.startswith(_SHOULD)]
    if of_its_kind:
        return of_its_kind[0]
    return _SHOULD + " or ".join(dict.fromkeys(reason.removeprefix(_SHOULD) for reason in reasons))


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
    return error_response(describe_validation(error.errors(), error.body))


def _handle_http_exception(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}"
    messages = {404: f"No such endpoint: {where}", 405: f"Not allowed here: {where}"}
    message = messages.get(error.status_code, str(error.detail))
    code = _CODES.get(error.status_code, "invalid_request")
    headers = {"Allow": _allowed_methods(request)} if error.status_code == 405 else error.headers
    return error_response(ApiError(error.status_code, message, code=code, headers=headers))


def _allowed_methods(request: Request) -> str:
    """The methods of an address: each is a route of its own, and Starlette names those of the first alone."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = {
        method for route in routes if route.matches(request.scope)[0] != Match.NONE for method in route.methods or ()
    }
    return ", ".join(sorted(found))


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
