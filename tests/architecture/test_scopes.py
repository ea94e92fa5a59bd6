"""Every route of the server asks for a scope, or is on the list of what answers without a key."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount

from jobs.scopes import Scope
from server import main
from server.scopes import PUBLIC, UnknownRouteError, find_scope
from server.settings import ServerSettings


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """The server, which connects to nothing before it starts."""
    settings = ServerSettings(
        database_url="postgresql+psycopg://nobody@127.0.0.1:1/none",
        broker_url="redis://127.0.0.1:1/0",
        data_dir=Path("/nonexistent"),
    )
    return main.create_app(settings)


def names(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route; a mount has no method."""
    found = []
    for route in app.routes:
        if isinstance(route, APIRoute):
            found += [(method, route.path) for method in route.methods]
        else:
            assert isinstance(route, Mount), f"a route of a kind that nobody guards: {route}"
            found.append(("", route.path))
    return found


def test_every_route_has_a_scope_or_is_public(app: FastAPI) -> None:
    without, unknown = [], []
    for method, path in names(app):
        name = f"{method} {path}".strip()
        if name in PUBLIC:
            continue
        try:
            if find_scope(method, path) is None:
                without.append(name)
        except UnknownRouteError:
            unknown.append(name)
    assert not unknown, "add them to server/scopes.py"
    assert without == ["POST /logout"], "what every key may do"


def test_what_is_public_exists(app: FastAPI) -> None:
    assert {f"{method} {path}".strip() for method, path in names(app)} >= PUBLIC


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("GET /v1/fine_tuning/jobs", Scope.JOBS_READ),
        ("POST /v1/fine_tuning/jobs", Scope.JOBS_WRITE),
        ("POST /v1/fine_tuning/jobs/{job_id}/cancel", Scope.JOBS_WRITE),
        ("GET /v1/fine_tuning/jobs/{job_id}/metrics", Scope.JOBS_READ),
        ("DELETE /v1/files/{file_id}", Scope.FILES_WRITE),
        ("GET /v1/files/{file_id}/content", Scope.FILES_READ),
        ("POST /v1/uploads", Scope.FILES_WRITE),
        ("GET /v1/models/{model:path}", Scope.MODELS_READ),
        ("DELETE /v1/models/{model:path}", Scope.MODELS_WRITE),
        ("POST /v1/chat/completions", Scope.CHAT),
        ("POST /v1/plan", Scope.JOBS_READ),
        ("GET /metrics", Scope.METRICS_READ),
        ("GET /v1/organization/usage", Scope.JOBS_READ),
        ("GET /v1/organization/projects", Scope.ADMIN),
        ("GET /v1/organizations", Scope.ADMIN),
        ("DELETE /v1/organizations/{organization_id}", Scope.ADMIN),
    ],
)
def test_scopes_of_routes(name: str, scope: Scope) -> None:
    method, _, path = name.partition(" ")
    assert find_scope(method, path) is scope


@pytest.mark.parametrize("path", ["/v1/new", "/v1/filesystem", "/v1", "/metrics2", "/", "/assets"])
def test_what_the_table_does_not_know_is_nobodys(path: str) -> None:
    with pytest.raises(UnknownRouteError):
        find_scope("GET", path)


def test_a_route_that_nobody_thought_of_keeps_the_server_from_starting() -> None:
    router = APIRouter()

    @router.get("/v1/forgotten")
    def get_forgotten() -> None:
        """A route without a scope."""

    app = FastAPI(openapi_url=None)
    app.router.routes.extend(router.routes)
    with pytest.raises(UnknownRouteError, match="GET /v1/forgotten"):
        main.check_scopes(app)
