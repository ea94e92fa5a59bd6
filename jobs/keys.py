"""API keys and dashboard sessions: random tokens of which only the SHA-256 is kept.

A token has 256 random bits, so that a fast hash is enough: there is nothing to guess. Form of a key:
`sk-lomo-<id>-<secret>`; the id is public and finds the row. A key that was rotated has two secrets for a while. Making
keys, listing and ending them: `key_admin.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.models import ApiKey, BrowserSession
from jobs.organizations import DEFAULT_ORGANIZATION, ensure_organization
from jobs.owner import Owner
from jobs.scopes import ALL, ORDINARY, Scope, read_scopes

SESSION_LIFETIME = timedelta(days=7)

_TOKEN = re.compile(r"sk-lomo-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
# `last_used_at` is for people who look for unused keys: a minute is precise enough, and spares a write per request.
_LAST_USED_GRAIN = timedelta(minutes=1)

IS_VALID = ApiKey.revoked_at.is_(None) & func.coalesce(ApiKey.expires_at > func.now(), True)
"""Neither revoked nor expired, by the database's clock."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling."""

    organization_id: str
    api_key_id: str
    key_name: str
    project_id: str
    """Where what it makes belongs: its key's project, or the one that its request names."""
    scopes: frozenset[Scope] = frozenset()
    valid_until: datetime | None = None
    """When the credential ends by itself."""
    is_narrowed: bool = False
    """Whether its request names a project: then an administrator, too, acts in that one alone."""

    @property
    def home(self) -> Owner:
        """Whose what it makes is."""
        return Owner(self.organization_id, self.project_id)

    @property
    def view(self) -> Owner:
        """Whose things it sees and changes: its project's, or an administrator's whole organization's."""
        sees_all = Scope.ADMIN in self.scopes and not self.is_narrowed
        return Owner(self.organization_id) if sees_all else self.home

    def narrowed_to(self, project_id: str) -> Principal:
        """The same, acting in one project alone."""
        return replace(self, project_id=project_id, is_narrowed=True)

    @property
    def is_operator(self) -> bool:
        """Whether this is an administrator of the organization that runs the service."""
        return Scope.ADMIN in self.scopes and self.organization_id == DEFAULT_ORGANIZATION


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret at the only moment at which it is known."""

    text: str = field(repr=False)

    @classmethod
    def new(cls) -> Secret:
        """A random one."""
        return cls(secrets.token_urlsafe(32))

    @property
    def sha256(self) -> str:
        """What is kept of it."""
        return _sha256(self.text)

    def token(self, key_id: str) -> str:
        """The token of a key with this secret."""
        return f"sk-lomo-{key_id}-{self.text}"


def create_key(
    db: Database,
    *,
    name: str,
    organization_id: str = DEFAULT_ORGANIZATION,
    scopes: frozenset[Scope] = ORDINARY,
) -> str:
    """Make a key of the organization's default project and return its token: the only moment at which it is known. An
    organization that is not there yet is made."""
    secret = Secret.new()
    with db.transaction() as session:
        project_id = ensure_organization(session, organization_id)
        key = new_key(secret, organization_id=organization_id, project_id=project_id, name=name, scopes=scopes)
        session.add(key)
    return secret.token(key.id)


def new_key(secret: Secret, *, organization_id: str, project_id: str, name: str, scopes: frozenset[Scope]) -> ApiKey:
    """The row of a new key."""
    return ApiKey(
        id=secrets.token_hex(6),
        organization_id=organization_id,
        project_id=project_id,
        name=name,
        scopes=sorted(scopes),
        secret_sha256=secret.sha256,
    )


def ensure_admin_key(db: Database, path: Path) -> bool:
    """Write a first key to `path` (mode 0600) if nobody has one to administer this installation with. Returns whether
    it did."""
    with db.read() as session:
        if has_operator(session):
            return False
    token = create_key(db, name="admin", scopes=ALL)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return True


def has_operator(session: Session, *, besides: str = "") -> bool:
    """Whether a key other than `besides` administers this installation."""
    operators = (ApiKey.organization_id == DEFAULT_ORGANIZATION) & ApiKey.scopes.contains([Scope.ADMIN.value])
    return bool(session.scalar(select(exists().where(operators, IS_VALID, ApiKey.id != besides))))


def authenticate(db: Database, token: str) -> Principal | None:
    """The caller behind a bearer token, or None where the token is malformed, unknown, expired or revoked."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    is_stale = func.coalesce(ApiKey.last_used_at < func.now() - _LAST_USED_GRAIN, True)
    previous_is_valid = func.coalesce(ApiKey.previous_expires_at > func.now(), False)
    with db.read() as session:
        row = session.execute(
            select(ApiKey, is_stale, previous_is_valid).where(ApiKey.id == match[1], IS_VALID)
        ).one_or_none()
    if row is None:
        return None
    key, stale, previous_taken = row
    given, valid_until = _sha256(match[2]), key.expires_at
    if not hmac.compare_digest(key.secret_sha256, given):
        if not previous_taken or not hmac.compare_digest(key.previous_sha256 or "", given):
            return None
        ends = [moment for moment in (key.expires_at, key.previous_expires_at) if moment is not None]
        valid_until = min(ends)
    if stale:
        with db.transaction() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key.id).values(last_used_at=func.now()))
    return _principal(key, valid_until)


def open_session(db: Database, principal: Principal) -> str:
    """Start a dashboard session and return the cookie's value; expired sessions are swept on the way. It does not
    outlast the credential that it was opened with."""
    token = secrets.token_urlsafe(32)
    with db.transaction() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.expires_at < func.now()))
        session.add(
            BrowserSession(
                token_sha256=_sha256(token),
                api_key_id=principal.api_key_id,
                expires_at=session.scalars(
                    select(func.least(func.now() + SESSION_LIFETIME, principal.valid_until))
                ).one(),
            )
        )
    return token


def authenticate_session(db: Database, token: str) -> Principal | None:
    """The caller behind a session cookie, or None where it is unknown or expired or its key has ended."""
    query = (
        select(ApiKey)
        .join(BrowserSession, BrowserSession.api_key_id == ApiKey.id)
        .where(BrowserSession.token_sha256 == _sha256(token), BrowserSession.expires_at > func.now(), IS_VALID)
    )
    with db.read() as session:
        key = session.scalar(query)
    return None if key is None else _principal(key, key.expires_at)


def close_session(db: Database, token: str) -> None:
    """End a dashboard session."""
    with db.transaction() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == _sha256(token)))


def _principal(key: ApiKey, valid_until: datetime | None) -> Principal:
    return Principal(key.organization_id, key.id, key.name, key.project_id, read_scopes(key.scopes), valid_until)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
