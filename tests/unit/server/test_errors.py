"""The one table from our errors to HTTP: every error of the domain has its place in OpenAI's shape."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import httpx
import orjson
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from jobs.errors import InvalidRequestError, InvalidStateError, JobsError, NotFoundError
from server import errors
from server.errors import ApiError, error_response


def answer(error: Exception) -> httpx.Response:
    """What a route that raises `error` answers."""
    app = FastAPI()
    errors.install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/")

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NotFoundError("No such job", param="id"), 404, "not_found"),
        (InvalidRequestError("Wrong"), 400, "invalid_value"),
        (InvalidRequestError("Big", code="file_too_large"), 413, "file_too_large"),
        (InvalidRequestError("Big", code="part_too_large"), 413, "part_too_large"),
        # 409 would be sent again, twice, by every official client.
        (InvalidStateError("Ended"), 400, "invalid_state"),
    ],
)
def test_domain_errors(error: JobsError, status: int, code: str) -> None:
    response = answer(error)
    assert response.status_code == status
    assert response.json()["error"] == {
        "message": error.message,
        "type": "invalid_request_error",
        "param": error.param,
        "code": code,
    }


@pytest.mark.parametrize(
    "make", [lambda: OperationalError("SELECT secret", {}, Exception("down")), lambda: PoolTimeoutError("no room")]
)
def test_unreachable_database_is_temporary(make: Callable[[], Exception]) -> None:
    response = answer(make())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "database_unavailable"
    assert "secret" not in response.text


def test_unexpected_error_tells_nothing() -> None:
    response = answer(RuntimeError("secret"))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")]
)
def test_type_follows_the_status(status: int, kind: str) -> None:
    body = orjson.loads(error_response(ApiError(status, "Text", code="some_code")).body)
    assert body == {"error": {"message": "Text", "type": kind, "param": None, "code": "some_code"}}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_not_tried_again(number: int) -> None:
    response = answer(OSError(number, "write failed", "/secret/place"))
    assert (response.status_code, response.json()["error"]["code"]) == (507, "disk_full")
    assert response.headers["x-should-retry"] == "false"
    assert "/secret/place" not in response.text


def test_another_failure_of_the_disk_is_our_mistake() -> None:
    assert answer(OSError(errno.EIO, "read failed")).status_code == 500
