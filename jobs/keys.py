"""API keys and dashboard sessions: random tokens of which only the SHA-256 is kept.

A token has 256 random bits, so that a fast hash is enough: there is nothing to guess. Form of a key:
`sk-lomo-<id>-<secret>`; the id is public and finds the row.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import delete, func, select, update

from jobs.db import Database
from jobs.models import ApiKey, BrowserSession

DEFAULT_ORGANIZATION = "org-local"
SESSION_LIFETIME = timedelta(days=7)

_TOKEN = re.compile(r"sk-lomo-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
# `last_used_at` is for people who look for unused keys: a minute is precise enough, and spares a write per request.
_LAST_USED_GRAIN = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling."""

    organization_id: str
    api_key_id: str
    key_name: str


def create_key(db: Database, *, name: str, organization_id: str = DEFAULT_ORGANIZATION) -> str:
    """Make a key and return its token: the only moment at which it is known."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    with db.transaction() as session:
        session.add(ApiKey(id=key_id, organization_id=organization_id, name=name, secret_sha256=_sha256(secret)))
    return f"sk-lomo-{key_id}-{secret}"


def ensure_admin_key(db: Database, path: Path) -> bool:
    """Write a first key to `path` (mode 0600) if the database has no key yet. Returns whether it did."""
    with db.read() as session:
        if session.scalar(select(func.count()).select_from(ApiKey)):
            return False
    token = create_key(db, name="admin")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return True


def authenticate(db: Database, token: str) -> Principal | None:
    """The caller behind a bearer token, or None where the token is malformed, unknown or revoked."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    with db.read() as session:
        key = session.get(ApiKey, match[1])
        stale = key is not None and session.scalar(
            select(func.coalesce(ApiKey.last_used_at < func.now() - _LAST_USED_GRAIN, True)).where(ApiKey.id == key.id)
        )
    if key is None or not hmac.compare_digest(key.secret_sha256, _sha256(match[2])) or key.revoked_at is not None:
        return None
    if stale:
        with db.transaction() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key.id).values(last_used_at=func.now()))
    return Principal(key.organization_id, key.id, key.name)


def open_session(db: Database, principal: Principal) -> str:
    """Start a dashboard session and return the cookie's value; expired sessions are swept on the way."""
    token = secrets.token_urlsafe(32)
    with db.transaction() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.expires_at < func.now()))
        session.add(
            BrowserSession(
                token_sha256=_sha256(token),
                api_key_id=principal.api_key_id,
                expires_at=session.scalars(select(func.now() + SESSION_LIFETIME)).one(),
            )
        )
    return token


def authenticate_session(db: Database, token: str) -> Principal | None:
    """The caller behind a session cookie, or None where it is unknown or expired or its key was revoked."""
    query = (
        select(ApiKey)
        .join(BrowserSession, BrowserSession.api_key_id == ApiKey.id)
        .where(
            BrowserSession.token_sha256 == _sha256(token),
            BrowserSession.expires_at > func.now(),
            ApiKey.revoked_at.is_(None),
        )
    )
    with db.read() as session:
        key = session.scalar(query)
    return None if key is None else Principal(key.organization_id, key.id, key.name)


def close_session(db: Database, token: str) -> None:
    """End a dashboard session."""
    with db.transaction() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == _sha256(token)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
