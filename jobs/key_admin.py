"""How API keys are made, listed, rotated and revoked. Whoever may do so is for the server to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import InvalidStateError, NotFoundError
from jobs.keys import IS_VALID, Secret, has_operator, new_key
from jobs.models import ApiKey, BrowserSession
from jobs.organizations import DEFAULT_ORGANIZATION, default_project_id, owned_project
from jobs.reads import Page
from jobs.scopes import Scope

DEFAULT_GRACE_S = 24 * 3600
"""How long the secret before a rotation is taken: a day, in which every user of it can be found and changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRequest:
    """A key to be made."""

    organization_id: str
    project_id: str | None = None
    """None: the organization's default project."""
    name: str
    scopes: frozenset[Scope]
    lifetime_s: int | None = None
    """None: until it is revoked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPlace:
    """Where keys are looked for: another organization's or project's are as absent as those that do not exist."""

    organization_id: str
    project_id: str | None = None
    """None: in every project."""
    admin_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What is to change of a key; None: nothing."""

    name: str | None = None
    scopes: frozenset[Scope] | None = None
    lifetime_s: int | None = None
    """From now on."""


def create(db: Database, request: KeyRequest) -> tuple[ApiKey, str]:
    """Make a key. Returns it and its token, which is known at this moment only.

    Raises:
        NotFoundError: no such project of this organization.
        InvalidStateError: the project is archived.
    """
    secret = Secret.new()
    with db.transaction() as session:
        project_id = request.project_id or default_project_id(session, request.organization_id)
        # Locked, so that no key is made in a project that is just being archived.
        project = owned_project(session, request.organization_id, project_id, lock=True)
        if project.archived_at is not None:
            raise InvalidStateError(f"{project_id} is archived: no key can be made in it.")
        key = new_key(
            secret,
            organization_id=request.organization_id,
            project_id=project_id,
            name=request.name,
            scopes=request.scopes,
        )
        if request.lifetime_s is not None:
            key.expires_at = session.scalars(select(func.now() + timedelta(seconds=request.lifetime_s))).one()
        session.add(key)
        session.flush()
        session.refresh(key)
        return key, secret.token(key.id)


def list_keys(db: Database, place: KeyPlace, *, limit: int, after: str | None = None) -> Page[ApiKey]:
    """Keys that have not been revoked, oldest first; expired ones, too.

    Raises:
        NotFoundError: no such project, or `after` is no key there.
    """
    with db.read() as session:
        query = _query(session, place).order_by(ApiKey.created_at, ApiKey.id)
        if after is not None:
            last = _get(session, place, after)
            query = query.where(tuple_(ApiKey.created_at, ApiKey.id) > tuple_(last.created_at, last.id))
        rows: Sequence[ApiKey] = session.scalars(query.limit(limit + 1)).all()
        return Page(rows[:limit], has_more=len(rows) > limit)


def get(db: Database, place: KeyPlace, key_id: str) -> ApiKey:
    """One key that has not been revoked.

    Raises:
        NotFoundError: there is no such one.
    """
    with db.read() as session:
        return _get(session, place, key_id)


def change(db: Database, place: KeyPlace, key_id: str, wanted: KeyChange) -> ApiKey:
    """Change a key's name, scopes or end. Streams that it may no longer read end within 15 s.

    Raises:
        NotFoundError: there is no such key.
        InvalidStateError: it has expired, or nobody else could administer this installation.
    """
    with db.transaction() as session:
        key = _get_unexpired(session, place, key_id)
        if wanted.scopes is not None:
            if Scope.ADMIN not in wanted.scopes:
                _keep_an_operator(session, key)
            key.scopes = sorted(wanted.scopes)
        if wanted.name is not None:
            key.name = wanted.name
        if wanted.lifetime_s is not None:
            key.expires_at = session.scalars(select(func.now() + timedelta(seconds=wanted.lifetime_s))).one()
        session.flush()
        return key


def rotate(db: Database, place: KeyPlace, key_id: str, *, grace_s: int = DEFAULT_GRACE_S) -> tuple[ApiKey, str]:
    """Give a key another secret. The one before is taken for `grace_s` more, and so are the dashboard's sessions that
    were opened with it; one still older ends at once. Returns the key and its token.

    Raises:
        NotFoundError: there is no such key.
        InvalidStateError: it has expired.
    """
    secret = Secret.new()
    with db.transaction() as session:
        key = _get_unexpired(session, place, key_id)
        ends_at = func.now() + timedelta(seconds=grace_s)
        before: dict[str, Any] = {"previous_sha256": key.secret_sha256, "previous_expires_at": ends_at}
        if not grace_s:
            before = dict.fromkeys(before)
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(secret_sha256=secret.sha256, **before))
        session.execute(
            update(BrowserSession)
            .where(BrowserSession.api_key_id == key_id)
            .values(expires_at=func.least(BrowserSession.expires_at, ends_at))
        )
        session.refresh(key)
        return key, secret.token(key_id)


def revoke(db: Database, place: KeyPlace, key_id: str) -> None:
    """End a key for good. Its open streams end within 15 s.

    Raises:
        NotFoundError: there is no such key.
        InvalidStateError: nobody else could administer this installation.
    """
    with db.transaction() as session:
        _keep_an_operator(session, _get(session, place, key_id, lock=True))
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=func.now()))


def _keep_an_operator(session: Session, key: ApiKey) -> None:
    """See that somebody is left when this key administers no more.

    Raises:
        InvalidStateError: nobody would be.
    """
    if key.organization_id != DEFAULT_ORGANIZATION or Scope.ADMIN not in key.scopes:
        return
    # So that of two keys that end at once one stays.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("end an operator's key", 0))))
    if not has_operator(session, besides=key.id):
        raise InvalidStateError(
            f"{key.id} is the last key that this installation is administered with: create another one first."
        )


def _get_unexpired(session: Session, place: KeyPlace, key_id: str) -> ApiKey:
    key = _get(session, place, key_id, lock=True)
    if not session.scalar(select(IS_VALID).where(ApiKey.id == key_id)):
        raise InvalidStateError(f"The key {key_id} has expired: create another.")
    return key


def _query(session: Session, place: KeyPlace) -> Any:
    if place.project_id is not None:
        owned_project(session, place.organization_id, place.project_id)
    query = select(ApiKey).where(ApiKey.organization_id == place.organization_id, ApiKey.revoked_at.is_(None))
    if place.project_id is not None:
        query = query.where(ApiKey.project_id == place.project_id)
    if place.admin_only:
        query = query.where(ApiKey.scopes.contains([Scope.ADMIN.value]))
    return query


def _get(session: Session, place: KeyPlace, key_id: str, *, lock: bool = False) -> ApiKey:
    query = _query(session, place).where(ApiKey.id == key_id)
    key: ApiKey | None = session.scalar(query.with_for_update(key_share=True) if lock else query)
    if key is None:
        raise NotFoundError(f"No such API key: {key_id}", param="key_id")
    return key
