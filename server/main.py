"""The application: its parts, its middleware and its routes, closed to strangers unless a route is on the list."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount

from jobs.async_reads import AsyncReads
from jobs.db import Database
from jobs.dispatch import make_celery
from jobs.migrate import head_revision
from jobs.row_preview import PreviewPlaces
from jobs.shape_cache import SHAPES_NAME, ShapeCache
from server import errors
from server.auth import Authenticator
from server.chat import ChatClient
from server.deps import authenticated
from server.doorbell import Doorbell
from server.hub import Hub
from server.middleware import BodyLimit, Gate, RequestContext
from server.prometheus import Metrics
from server.rate_limit import RateLimiter
from server.routes import (
    chat,
    data,
    description,
    files,
    health,
    hosts,
    jobs,
    models,
    organization,
    organizations,
    pages,
    plan,
    queue,
    runs,
    uploads,
    webhooks,
)
from server.routes import metrics as metrics_route
from server.scopes import PUBLIC, find_scope
from server.services import Services
from server.settings import ServerSettings
from server.webhook_delivery import WebhookDelivery


def create_app(settings: ServerSettings) -> FastAPI:
    """The server as an ASGI application. Nothing is connected to before it starts."""
    db = Database(settings.database_url, pool_size=settings.database_pool_size)
    broker = make_celery(settings.broker_url)
    metrics = Metrics(db)
    services = Services(
        settings=settings,
        db=db,
        reads=AsyncReads(settings.database_url),
        broker=broker,
        doorbell=Doorbell(broker),
        authenticator=Authenticator(db),
        hub=Hub(db, settings),
        chats=ChatClient(settings.broker_url),
        shapes=ShapeCache(settings.data_dir / SHAPES_NAME),
        previews=PreviewPlaces(),
        metrics=metrics,
        webhooks=WebhookDelivery(db, settings),
        requests=RateLimiter(settings.requests_per_minute),
        failures=RateLimiter(settings.failed_logins_per_minute),
        schema_revision=head_revision(),
    )
    app = FastAPI(
        lifespan=_lifespan,
        # The API is described in docs/api.md; the generated pages would need a CDN.
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(RequestContext, metrics=metrics),
            Middleware(Gate, allowed_hosts=_allowed_hosts(settings)),
            Middleware(BodyLimit),
        ],
    )
    app.state.services = services
    errors.install(app)
    for module in (
        files,
        uploads,
        data,
        jobs,
        runs,
        models,
        chat,
        hosts,
        queue,
        plan,
        webhooks,
        health,
        metrics_route,
        description,
        pages,
    ):
        # Flat, not nested, so that what guards a route can be seen on it.
        app.router.routes.extend(module.router.routes)
    for module in (organization, organizations):
        app.router.routes.extend(module.router.routes)
    app.mount("/assets", StaticFiles(directory=pages.DASHBOARD_DIR, check_dir=False))
    unguarded = sorted(name for route in app.routes for name in _names(route) if not _is_guarded(route, name))
    if unguarded:
        raise RuntimeError(f"routes without authentication: {unguarded}")
    check_scopes(app)
    return app


def check_scopes(app: FastAPI) -> None:
    """See that for every route that needs a key it is known which scope it asks for.

    Raises:
        UnknownRouteError: for one it is not.
    """
    for route in app.routes:
        if isinstance(route, APIRoute):
            for method in route.methods or ():
                if f"{method} {route.path}" not in PUBLIC:
                    find_scope(method, route.path)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.reads.open()
    services.hub.start()
    services.webhooks.start()
    services.doorbell.start()
    yield
    await services.webhooks.close()
    await services.hub.close()
    await services.chats.close()
    await run_in_threadpool(services.doorbell.close)
    services.broker.close()
    await services.reads.close()
    services.db.dispose()


def _allowed_hosts(settings: ServerSettings) -> frozenset[str]:
    """The configured names, and the address listened on where it is one (and not every interface)."""
    names = [*settings.allowed_hosts]
    try:
        address = ip_address(settings.server_host)
    except ValueError:
        names.append(settings.server_host)
    else:
        if not address.is_unspecified:
            names.append(f"[{address}]" if address.version == 6 else str(address))
    return frozenset(name.lower() for name in names)


def _names(route: BaseRoute) -> Iterator[str]:
    if isinstance(route, APIRoute):
        yield from (f"{method} {route.path}" for method in route.methods or ())
    elif isinstance(route, Mount):
        yield route.path
    else:
        yield repr(route)


def _is_guarded(route: BaseRoute, name: str) -> bool:
    return name in PUBLIC or (isinstance(route, APIRoute) and _depends_on_caller(route.dependant))


def _depends_on_caller(dependant: Dependant) -> bool:
    return dependant.call is authenticated or any(_depends_on_caller(inner) for inner in dependant.dependencies)
