"""Who is calling: a bearer token or the dashboard's session cookie, and where such a request may come from.

A valid credential is remembered for some seconds, so that a busy client costs no query per request; its revocation by
this process is felt at once, by another when that memory ends. Requests that a browser sends by itself (the cookie) are
refused unless they come from our own pages: Sec-Fetch-Site where the browser sends it, else Origin.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from jobs import keys
from jobs.db import Database
from jobs.keys import Principal
from server.errors import forbidden

SESSION_COOKIE = "lomo_session"
# A revoked key or closed session must end within 15 s; streams are checked every RECHECK_S without this memory.
REMEMBER_S = 10.0
RECHECK_S = 15.0
# Entries; each is some 300 bytes. Beyond it the memory is emptied: it is only a memory.
_MAX_REMEMBERED = 4096
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Credential:
    """What a request shows: never logged, never compared other than by `Authenticator`."""

    kind: Literal["key", "session"]
    token: str


def find_credential(request: HTTPConnection) -> Credential | None:
    """The bearer token of a request, else its session cookie."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return Credential("key", token.strip())
    cookie = request.cookies.get(SESSION_COOKIE)
    return Credential("session", cookie) if cookie else None


class Authenticator:
    """Looks credentials up in the database, and remembers the valid ones for REMEMBER_S. Safe among threads."""

    def __init__(self, db: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._clock = clock
        self._remembered: dict[bytes, tuple[Principal, float]] = {}
        self._lock = threading.Lock()

    def find(self, credential: Credential) -> Principal | None:
        """The caller behind a credential, at most REMEMBER_S out of date."""
        return self.recall(credential) or self.find_fresh(credential)

    def recall(self, credential: Credential) -> Principal | None:
        """The caller behind a credential that was found to be valid in the last REMEMBER_S; asks nobody."""
        with self._lock:
            principal, until = self._remembered.get(_digest(credential), (None, 0.0))
        return principal if self._clock() < until else None

    def knows(self, credential: Credential) -> bool:
        """Whether a credential was valid not long ago, and may still be: a cheap guess."""
        with self._lock:
            return _digest(credential) in self._remembered

    def find_fresh(self, credential: Credential) -> Principal | None:
        """The caller behind a credential as of now."""
        look_up = keys.authenticate if credential.kind == "key" else keys.authenticate_session
        principal = look_up(self._db, credential.token)
        with self._lock:
            if principal is None:
                self._remembered.pop(_digest(credential), None)
            else:
                if len(self._remembered) >= _MAX_REMEMBERED:
                    self._remembered.clear()
                self._remembered[_digest(credential)] = (principal, self._clock() + REMEMBER_S)
        return principal

    def doubt(self, organization_id: str) -> None:
        """Ask the database again for each credential of an organization: one of its keys has been changed or revoked.
        In other server processes that takes up to REMEMBER_S."""
        with self._lock:
            for digest, (principal, _) in self._remembered.items():
                if principal.organization_id == organization_id:
                    self._remembered[digest] = (principal, 0.0)  # still one that was right before, see `knows`

    def close_session(self, credential: Credential) -> None:
        """End a dashboard session, here at once."""
        keys.close_session(self._db, credential.token)
        with self._lock:
            self._remembered.pop(_digest(credential), None)


def check_origin(request: HTTPConnection, *, method: str, required: bool) -> None:
    """Refuse an unsafe request that another site's page made a browser send.

    `required`: a request that says nothing of its origin is refused too (one with the cookie; a browser always says).

    Raises:
        ApiError: 403 `cross_site_request`.
    """
    if method in _SAFE_METHODS:
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        allowed = site in {"same-origin", "none"}
    elif origin is not None:
        allowed = urlsplit(origin).netloc == request.headers.get("host")
    else:
        allowed = not required
    if not allowed:
        raise forbidden("This request comes from another site's page and was refused.", code="cross_site_request")


def _digest(credential: Credential) -> bytes:
    return hashlib.sha256(f"{credential.kind} {credential.token}".encode()).digest()
