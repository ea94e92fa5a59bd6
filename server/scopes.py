"""Which scope a route asks for: one table, by the beginning of the path. Deny by default: a route that nothing here
speaks of is nobody's, and `create_app` refuses to start with it."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.scopes import Scope

# Everything that answers without a key: probes, the login, and pages and assets that hold code but no data.
PUBLIC = frozenset(
    {"GET /healthz", "GET /readyz", "GET /openapi.json", "GET /", "GET /login", "POST /login", "/assets"},
)

# What every key may do: end the session that it opened.
_ANY_KEY = frozenset({"POST /logout"})

# Single routes, which the table below would give another scope. A plan changes nothing.
_SINGLE = {
    "POST /v1/plan": Scope.JOBS_READ,
    "GET /v1/organization/usage": Scope.JOBS_READ,
}


@dataclass(frozen=True, slots=True)
class _Area:
    """The paths that begin so: what reads (GET) and what changes something asks for."""

    prefix: str
    read: Scope
    write: Scope


_AREAS = (
    _Area("/v1/fine_tuning", Scope.JOBS_READ, Scope.JOBS_WRITE),
    _Area("/v1/queue", Scope.JOBS_READ, Scope.JOBS_WRITE),
    _Area("/v1/hosts", Scope.JOBS_READ, Scope.ADMIN),
    _Area("/v1/files", Scope.FILES_READ, Scope.FILES_WRITE),
    _Area("/v1/uploads", Scope.FILES_READ, Scope.FILES_WRITE),
    _Area("/v1/models", Scope.MODELS_READ, Scope.MODELS_WRITE),
    _Area("/v1/webhook_endpoints", Scope.JOBS_READ, Scope.JOBS_WRITE),
    _Area("/v1/webhook_event_types", Scope.JOBS_READ, Scope.ADMIN),
    _Area("/v1/chat", Scope.CHAT, Scope.CHAT),
    _Area("/v1/organization", Scope.ADMIN, Scope.ADMIN),
    _Area("/v1/organizations", Scope.ADMIN, Scope.ADMIN),
    _Area("/metrics", Scope.METRICS_READ, Scope.ADMIN),
)


class UnknownRouteError(LookupError):
    """No scope is known for a route."""


def find_scope(method: str, path: str) -> Scope | None:
    """The scope that a route asks for, by its method and its path's template; None where any key will do.

    Raises:
        UnknownRouteError: the table does not speak of it.
    """
    name = f"{method} {path}"
    if name in _ANY_KEY:
        return None
    if name in _SINGLE:
        return _SINGLE[name]
    for area in _AREAS:
        if path == area.prefix or path.startswith(f"{area.prefix}/"):
            return area.read if method in {"GET", "HEAD"} else area.write
    raise UnknownRouteError(f"no scope is known for {name}: add it to server/scopes.py")
