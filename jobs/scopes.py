"""What a key may do: scopes, which the server asks for by route (`server/scopes.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from jobs.errors import InvalidRequestError


class Scope(StrEnum):
    """A part of the API. None of them includes another."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    FILES_READ = "files:read"
    FILES_WRITE = "files:write"
    MODELS_READ = "models:read"
    MODELS_WRITE = "models:write"
    CHAT = "chat"
    METRICS_READ = "metrics:read"
    """The figures of the whole service, of all organizations together."""
    ADMIN = "admin"
    """The keys and projects of the key's own organization; in the organization that runs the service, all of them."""


ALL = frozenset(Scope)
ORDINARY = ALL - {Scope.ADMIN}
"""What a key could do before there were scopes."""
OF_TENANTS = ORDINARY - {Scope.METRICS_READ}
"""What a key may do unless something else is said, and with `admin` all that one of a tenant can be given."""


def read_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Scopes by name, as they are stored. Names that this version does not know give nothing."""
    known = {scope.value: scope for scope in Scope}
    return frozenset(known[name] for name in names if name in known)


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Scopes by name, as they are asked for.

    Raises:
        InvalidRequestError: one is unknown, or there is none.
    """
    given = set(names)
    unknown = sorted(given - {scope.value for scope in Scope})
    if unknown or not given:
        wrong = f"There is no scope {unknown[0][:64]!r}" if unknown else "A key needs at least one scope"
        raise InvalidRequestError(f"{wrong}; the scopes are: {', '.join(Scope)}.", param="scopes")
    return read_scopes(given)
